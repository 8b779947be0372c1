"""Methods that train some of the existing tensors."""
