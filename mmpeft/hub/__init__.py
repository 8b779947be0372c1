"""The Hugging Face hub: adapters up and down, their cards, and whether it can be reached at all."""
