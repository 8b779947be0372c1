"""Small random models of every family of the libraries: where sites are found, and which methods live there."""
