"""Encoders, their parts and heads. Knows nothing of losses, data or training."""
