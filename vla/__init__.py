"""CLIP backbones through open_clip."""
