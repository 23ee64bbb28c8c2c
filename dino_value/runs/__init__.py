"""A run on disk: its folder, checkpoints, metrics, trackers, and the process that writes them."""
