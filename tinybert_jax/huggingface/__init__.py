"""Finds, reads, checks and writes Hugging Face model folders."""
