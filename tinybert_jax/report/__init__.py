"""The HTML report of a run, made from results.json and the other files of the run folder."""
