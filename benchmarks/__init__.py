"""This project and its peers, timed side by side: `python -m benchmarks`."""
