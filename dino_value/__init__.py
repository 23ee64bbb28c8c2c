"""Value-based continued pretraining: a task designer, taught by a few labels, chooses what is to be predicted."""

__version__ = "0.1.0"
