"""Runnable experiments: `python -m experiments pretrain --help`."""
