"""The objectives of the stages: sums of losses, as pure functions of parameters and a batch."""
