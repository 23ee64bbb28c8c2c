"""What the evaluations share, under one name: base.py (settings, results), features.py, fitting.py,
finetuning.py, output.py.

An evaluation is a pure function of (backbone, sources, options): nothing here reads or moves a global random
state. On CUDA it repeats to rounding only, because bilinear upsampling adds its gradients in no fixed order.
"""

from dino_value.eval.base import (
    NOT_SETTINGS,
    Evaluation,
    HeadOptions,
    Options,
    Result,
    View,
    check_inputs,
    check_options,
    labelled,
    names_of,
    pick_device,
    timed,
)
from dino_value.eval.features import (
    FIXED,
    FrozenBackbone,
    Items,
    Memory,
    Reader,
    Varies,
    compact,
    extract,
    forward_batch,
    frozen,
    in_order,
    last_blocks,
    remember,
    same_size_runs,
    shuffled_keys,
    training_batches,
    validation_images,
)
from dino_value.eval.finetuning import FineTuned, fit
from dino_value.eval.fitting import fit_head, seeded, train_head
from dino_value.eval.output import prepare_folder, script, write_results

__all__ = [
    "FIXED",
    "NOT_SETTINGS",
    "Evaluation",
    "FineTuned",
    "FrozenBackbone",
    "HeadOptions",
    "Items",
    "Memory",
    "Options",
    "Reader",
    "Result",
    "Varies",
    "View",
    "check_inputs",
    "check_options",
    "compact",
    "extract",
    "fit",
    "fit_head",
    "forward_batch",
    "frozen",
    "in_order",
    "labelled",
    "last_blocks",
    "names_of",
    "pick_device",
    "prepare_folder",
    "remember",
    "same_size_runs",
    "script",
    "seeded",
    "shuffled_keys",
    "timed",
    "train_head",
    "training_batches",
    "validation_images",
    "write_results",
]
