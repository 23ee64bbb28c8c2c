"""Sweeps: settings searched by Optuna, judged by evaluations (docs/sweeps.md).

``spec`` says what is searched, ``work`` takes one trial after another, ``claims`` keeps two processes from taking the
same, ``command`` is `dino-value sweep`, ``agent`` what a W&B agent calls.
"""
