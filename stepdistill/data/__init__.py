"""Data: pictures, captions, prompts, latents, pairs."""
