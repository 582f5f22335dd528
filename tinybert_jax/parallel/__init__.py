"""The device mesh, and which device holds which part of an array."""
