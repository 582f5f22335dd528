"""The processes of a run, the device mesh, and which device holds which part of an array."""
