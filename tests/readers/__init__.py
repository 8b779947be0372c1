"""Other programs' own loaders, run on what this suite writes. See tests/readers/language.py."""
