"""What is asked of whole runs: arms against each other, Pareto fronts, the probe, the quickstart, a replayed step."""
