"""Attention of diffusers' networks: which kernel computes it, negative prompts inside it (NASA), fused projections.

Kernels go by diffusers' names (``native`` is SDPA with torch's own choice of kernel; ``_native_math``, ``flash``,
``xformers``, ``sage``, ...) and are chosen for one network at a time.  diffusers' ``set_attention_backend`` changes a
process-wide default as well, which a teacher and its student would share, and does nothing for networks of the older
``Attention`` module (Stable Diffusion's UNets, UNet2DModel), so neither is used: those modules get an
:class:`~stepdistill.attention.processor.AttentionProcessor`, which passes the backend with each call, and newer ones
get the field of their processor written.
"""
