"""Segmentation by text: decoders over the blocks of an image-text pair, frozen or tuned."""
