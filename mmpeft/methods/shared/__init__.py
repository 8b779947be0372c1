"""What several methods have in common; no method of its own lives here."""
