"""Methods composed of others."""
