"""Time, memory and compile time of low-rank training against what one would use instead: `python -m benchmarks`."""
