"""What several benchmarks look at."""
