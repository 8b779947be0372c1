"""What other programs make of the files that are written here: a table of readers, formats and methods.

    python -m benchmarks.readers --sources DIR --write docs/readers.md

Each reader is a module of this package with `NAME`, `version(sources)` and a `main` that runs in a process of its own,
with that program's own loader code: from a checkout under DIR, or from the package that is installed.
"""
