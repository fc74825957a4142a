"""Files on disk on one side, metadata and named tensors on the other; numpy only."""
