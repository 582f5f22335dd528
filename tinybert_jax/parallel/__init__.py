"""Which devices hold which part of an array."""
