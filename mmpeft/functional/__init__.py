"""Pure maths: one formula, one function, shape-typed. Nothing here knows a module, a site or a method."""
