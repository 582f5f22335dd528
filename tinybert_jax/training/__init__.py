"""The step, the loop, the optimizer, and the policies that a stage of training follows."""
