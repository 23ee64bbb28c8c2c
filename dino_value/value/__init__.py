"""The value core: ∇_φ ⟨u, ∇_{θ_S} L_pre(θ; φ)⟩ for a frozen direction u, as direction × engine × scope.

Nothing here knows of images or text. A learner joins by giving a `Task` (see `engines`); docs/value.md is the guide.
"""

from dino_value.value.averages import GradientAverage, Refreshed, mean_gradient
from dino_value.value.check import check_engine, check_start, choose_engine, choose_radius, engine_error, require
from dino_value.value.combination import COMBINATIONS, Guard, check_method, combine
from dino_value.value.diagnostics import (
    Alignment,
    ValueGain,
    alignment,
    gradient_norm,
    spearman_brown,
    split_half,
    task_alignment,
    value_gain,
)
from dino_value.value.directions import (
    DIRECTIONS,
    AdamState,
    Direction,
    Gradient,
    adam,
    adam_update,
    inner,
    norm,
    random_like,
)
from dino_value.value.distributed import average, average_gradients
from dino_value.value.engines import (
    ENGINES,
    Engine,
    LinearTask,
    Task,
    double_backward,
    finite_difference,
    linear,
    pre_gradient,
)
from dino_value.value.lookahead import OPTIMIZERS as LOOKAHEAD_OPTIMIZERS
from dino_value.value.lookahead import Shadow, contrast, lookahead
from dino_value.value.probing import (
    ProbeResult,
    Trial,
    bootstrap_interval,
    optimizer_update,
    pearson,
    probe,
    sgd_update,
    slope,
)
from dino_value.value.scope import Scope, everything, last_blocks, matching
from dino_value.value.score import leave_one_out, score_loss
from dino_value.value.step import ValueStep, value_step
from dino_value.value.targets import Mover, tilt
from dino_value.value.terms import best_of, term_values, value_weights

__all__ = [
    "COMBINATIONS",
    "DIRECTIONS",
    "ENGINES",
    "LOOKAHEAD_OPTIMIZERS",
    "AdamState",
    "Alignment",
    "Direction",
    "Engine",
    "Gradient",
    "GradientAverage",
    "Guard",
    "LinearTask",
    "Mover",
    "ProbeResult",
    "Refreshed",
    "Scope",
    "Shadow",
    "Task",
    "Trial",
    "ValueGain",
    "ValueStep",
    "adam",
    "adam_update",
    "alignment",
    "average",
    "average_gradients",
    "best_of",
    "bootstrap_interval",
    "check_engine",
    "check_method",
    "check_start",
    "choose_engine",
    "choose_radius",
    "combine",
    "contrast",
    "double_backward",
    "engine_error",
    "everything",
    "finite_difference",
    "gradient_norm",
    "inner",
    "last_blocks",
    "leave_one_out",
    "linear",
    "lookahead",
    "matching",
    "mean_gradient",
    "norm",
    "optimizer_update",
    "pearson",
    "pre_gradient",
    "probe",
    "random_like",
    "require",
    "score_loss",
    "sgd_update",
    "slope",
    "spearman_brown",
    "split_half",
    "task_alignment",
    "term_values",
    "tilt",
    "value_gain",
    "value_step",
    "value_weights",
]
