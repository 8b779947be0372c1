"""Damaged and hostile files of every format: errors of the suite alone, and a model that is as before."""
