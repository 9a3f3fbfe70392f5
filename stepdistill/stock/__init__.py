"""Folders of stock diffusers pipelines."""
