"""language backbones through transformers."""
