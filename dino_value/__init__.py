"""Value-based continued pretraining: a task designer, taught by a few labels, chooses what a backbone learns to predict."""

__version__ = "0.1.0"
