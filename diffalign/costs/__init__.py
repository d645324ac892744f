"""What a run costs, before it runs: bytes, network rows, how many processes it fits."""
