"""Several processes of one run: collective operations by torch.distributed, and sharded weights."""
