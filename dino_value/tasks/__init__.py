"""What a label is: one entry a kind."""
