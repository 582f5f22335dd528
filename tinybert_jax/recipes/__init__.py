"""The stages, one flat recipe each; `pipeline` runs them in order."""
