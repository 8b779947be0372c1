"""Data of image-text tasks."""
