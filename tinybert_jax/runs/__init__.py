"""One run: its inputs, its folder, its stages and their results."""
