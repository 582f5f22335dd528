"""Hugging Face folders: found, read, checked, written."""
