"""Attention kernels: their choice, the processor, fused projections."""
