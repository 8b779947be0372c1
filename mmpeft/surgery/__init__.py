"""`attach`, `detach`, `use`: the only place where modules are changed, and what every host does under a route."""
