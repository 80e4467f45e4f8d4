"""A run: building objects from a config, the training loop over its stages, checkpoints, and `explain`."""
