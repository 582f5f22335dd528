"""Scores of answers, computed on the host."""
