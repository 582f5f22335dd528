"""What computing costs: FLOPs, peaks of devices, traces, and the host's memory."""
