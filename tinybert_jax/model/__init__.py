"""The encoder, its heads and how to build them. Knows nothing of losses, data or training."""
