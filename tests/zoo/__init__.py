"""Small random models of every architecture that a library offers."""
