"""Bridges to other checkpoint formats: the one weight table, and what reads and writes by it."""
