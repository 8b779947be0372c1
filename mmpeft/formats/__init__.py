"""Adapter files in and out."""
