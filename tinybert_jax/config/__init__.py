"""All settings of a run, with their types and defaults. Imports no JAX."""
