"""Flax nnx."""
