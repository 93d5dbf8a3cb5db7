"""Methods that make a language model cheaper to run: one file per system, shared mathematics beside them."""
