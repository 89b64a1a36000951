"""Flax linen."""
