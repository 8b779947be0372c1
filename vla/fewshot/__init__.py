"""Few-shot recognition: a pair of towers, class names, and a handful of labelled images."""
