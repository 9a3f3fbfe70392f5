"""Measuring pipelines: distances, CLIP score, latency, comparison grids, and a run's report.

Pipelines are loaded by stock diffusers alone (:mod:`.stock`) and measured under one protocol (:mod:`.evaluate`).
Knows the library and no trainer.
"""
