"""Roles: networks, adapters, averages, LoRA files, recorded weights, discriminator heads."""
