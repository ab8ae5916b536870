"""The gradient as a traced linear function, folded to what depends on the vector."""
