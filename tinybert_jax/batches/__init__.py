"""Examples to device batches: tokenised rows, bucketing, packing, the loader."""
