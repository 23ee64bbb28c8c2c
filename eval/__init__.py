"""Evaluations of a frozen backbone: each file has a pure `measure`, its flags, and a `main` for the command line."""

EVALUATIONS = {
    "linear": "dino_value.eval.linear",
    "knn": "dino_value.eval.knn",
    "seg": "dino_value.eval.seg",
    "depth": "dino_value.eval.depth",
    "retrieval": "dino_value.eval.retrieval",
}
"""Name on the command line to the module that holds its `EVALUATION`: a new one is a file and a line here."""
