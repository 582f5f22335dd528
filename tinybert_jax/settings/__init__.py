"""The kinds of values that settings are made of. Imports no JAX."""
