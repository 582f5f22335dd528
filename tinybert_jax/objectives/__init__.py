"""What a stage minimises: losses put together, as pure functions of parameters and a batch."""
