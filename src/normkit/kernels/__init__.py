"""Four primitives over segments; each kernel set implements them, ``reference`` defines them."""
