"""The value core: ∇_φ ⟨u, ∇_{θ_S} L_pre(θ; φ)⟩ for a frozen direction u, as direction × engine × scope.

Nothing here knows of images or text. A learner joins by giving a `Task` (see `engines`).
"""

from dino_value.value.directions import DIRECTIONS, Direction, Gradient, combine, inner, norm, random_like
from dino_value.value.engines import ENGINES, Engine, Task, double_backward, finite_difference, pre_gradient
from dino_value.value.scope import Scope, last_blocks, matching
from dino_value.value.step import ValueStep, value_step

__all__ = [
    "DIRECTIONS",
    "ENGINES",
    "Direction",
    "Engine",
    "Gradient",
    "Scope",
    "Task",
    "ValueStep",
    "combine",
    "double_backward",
    "finite_difference",
    "inner",
    "last_blocks",
    "matching",
    "norm",
    "pre_gradient",
    "random_like",
    "value_step",
]
