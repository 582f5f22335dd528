"""One recipe per kind of stage, read from top to bottom; `pipeline` runs the stages in order."""
