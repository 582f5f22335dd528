"""Finished models at work: the public Python classes, prediction and evaluation of files."""
