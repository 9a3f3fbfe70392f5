"""Latency and inference benchmarks."""
