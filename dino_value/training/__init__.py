"""The loop, the designer's side of it, heads fitted to labels, optimisers, and what watches over a run."""
