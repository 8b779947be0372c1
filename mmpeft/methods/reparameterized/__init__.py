"""Methods that train an update of existing weights."""
