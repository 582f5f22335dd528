"""Kinds of tasks: one file per kind; `table` lists all kinds."""
