"""Scoring of data sets, prediction, and the public Python classes."""
