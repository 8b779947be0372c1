"""Methods that save memory or time beyond the parameters."""
