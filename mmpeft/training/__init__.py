"""Lightning: the task base class, data base class, callbacks, checkpoints and the command line."""
