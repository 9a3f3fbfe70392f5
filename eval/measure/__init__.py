"""Distances, metrics, protocols."""
