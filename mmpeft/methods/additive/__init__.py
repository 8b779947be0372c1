"""Methods that add modules, tokens or vectors."""
