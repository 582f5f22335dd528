"""Model FLOPs, peaks of devices, traces of training steps, and memory and locks of the host."""
