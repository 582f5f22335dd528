"""Models at work: scoring of data sets, prediction, the public Python classes."""
