"""Every setting of a run, its default and what it may be. Imports no JAX."""
