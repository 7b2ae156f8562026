"""The training loop and what it stands on: optimisers, guards, checkpoints, logs."""
