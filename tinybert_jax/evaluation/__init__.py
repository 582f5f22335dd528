"""Models run over a whole data set. Knows nothing of training."""
