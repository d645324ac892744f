"""Several processes of one run: torch.distributed behind the loop's verbs, and weights that are spread over them."""
