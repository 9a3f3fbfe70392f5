"""Judges: networks that look at pictures for a loss or a score."""
