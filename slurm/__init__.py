"""Launching on a cluster: submits the package's entry points as jobs, and imports nothing else of it."""
