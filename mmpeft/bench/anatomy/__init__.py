"""`mmpeft sites`: where a model can be tuned, as a table and as a picture."""
