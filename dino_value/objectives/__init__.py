"""Self-supervised objectives: views in, loss out.

`interface.py` says what training asks of one. `self_distillation.py` is DINO and what DINOv2 and DINOv3 add to it, made
of `dino`, `sinkhorn`, `ibot`, `koleo` and `gram`; `ijepa.py` is I-JEPA.
"""
