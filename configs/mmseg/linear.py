# ruff: noqa: C408 (mmsegmentation writes its configs with dict)
"""Batch norm and a 1×1 convolution on the last block's patch map: the linear probe of DINOv2 and DINOv3."""

_base_ = "./ade20k.py"

embed_dim = 768

model = dict(
    # weights: a run folder or a weights file; a file that does not name its architecture needs model="vit_…" too
    backbone=dict(type="DinoValueBackbone", weights=None, out_indices=(-1,), frozen=True),
    decode_head=dict(
        type="LinearBN",
        in_channels=[embed_dim],
        in_index=[0],
        input_transform="resize_concat",
        channels=embed_dim,
        num_classes=150,
        # ours averages over labelled pixels; mmsegmentation's default counts ignored ones in the mean
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    ),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
