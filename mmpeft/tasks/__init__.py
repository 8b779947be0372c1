"""Tasks: `TuningModule`, from which every domain's tasks come, and what they share."""
