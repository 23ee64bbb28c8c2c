"""Self-supervised objectives: views in, loss out."""
