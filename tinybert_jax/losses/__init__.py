"""Losses: pure functions of arrays, with mask and count inside."""
