"""Training data: texts cut into samples, and the order in which they are seen."""
