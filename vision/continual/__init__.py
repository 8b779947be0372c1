"""Class-incremental learning: a sequence of tasks over disjoint classes, no samples of earlier ones."""
