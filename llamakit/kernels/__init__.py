"""Native products over packed weights: a whole Llama forward in one call (native/forward.c)."""
