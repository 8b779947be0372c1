"""After training: what several adapters give together."""
