# ruff: noqa: C408 (mmsegmentation writes its configs with dict)
"""UPerNet (arXiv 1807.10221) on the maps of four blocks, at strides of 4 to 32 px by a neck (for patches of 16)."""

_base_ = "./ade20k.py"

embed_dim = 768
norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN on several devices

model = dict(
    # weights: a run folder or a weights file; a file that does not name its architecture needs model="vit_…" too
    backbone=dict(type="DinoValueBackbone", weights=None, out_indices=(2, 5, 8, 11), frozen=True),
    neck=dict(type="MultiLevelNeck", in_channels=[embed_dim] * 4, out_channels=embed_dim, scales=[4, 2, 1, 0.5]),
    decode_head=dict(
        type="UPerHead",
        in_channels=[embed_dim] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    ),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
