"""Job files for clusters: SLURM, Kubernetes, Google Cloud and SkyPilot."""
