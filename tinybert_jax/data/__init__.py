"""From raw text to batches: sources, the built-in data set, tokenizing and batch plans."""
