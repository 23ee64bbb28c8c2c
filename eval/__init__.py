"""Evaluations of a frozen backbone: each file is a pure `evaluate` and a `main` for the command line."""
