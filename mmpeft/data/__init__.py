"""Data modules: what every domain's data build on. Loading, images, captions, and what a task and its data agree on."""
