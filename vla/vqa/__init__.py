"""Visual question answering: both towers of a pair, a small fusion transformer, a vocabulary of answers."""
