"""Peers and this project, timed side by side: `python -m benchmarks`."""
