"""Scores of predictions, computed on the host with NumPy."""
