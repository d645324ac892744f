"""What diffalign costs, what it learns, and what must hold when things go wrong: `python -m benchmarks`."""
