"""The HTML page of a run. Knows results.json and the other files of a run folder, nothing else."""
