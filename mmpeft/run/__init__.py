"""Runs: from a configuration to a trainer with its callbacks, checkpoints, and a finished run read back."""
