# ruff: noqa: C408 (mmsegmentation writes its configs with dict)
"""ADE20K SceneParsing for mmsegmentation: data, schedule, runtime; the base of linear.py and upernet.py.

As published for linear probes of DINOv2 (arXiv 2304.07193, appendix B.2): images with a short side of 512 px, crops of
512, AdamW, and a sliding window. `dino-value eval seg --backend mmseg` replaces sizes, folders and lengths by its own.
"""

default_scope = "mmseg"
# Registers what is ours below; imports mmsegmentation without compiled mmcv ops.
custom_imports = dict(imports=["dino_value.eval.mmseg_parts"], allow_failed_imports=False)

data_root = "data/ADEChallengeData2016"
classes = None  # None: as objectInfo150.txt of data_root lists them
crop_size = (512, 512)
max_iters = 20_000
warmup = 1_000

# Images as RGB in 0 … 255, padded in black: the backbone knows its own mean and deviation.
data_preprocessor = dict(type="SegDataPreProcessor", bgr_to_rgb=True, size=crop_size, pad_val=0, seg_pad_val=255)
model = dict(type="EncoderDecoder", data_preprocessor=data_preprocessor, train_cfg=dict())

# Pillow's bilinear has antialiasing; OpenCV's, which is mmsegmentation's default, has none (docs/mmseg.md).
train_pipeline = [
    dict(type="ReadImage"),
    dict(type="LoadAnnotations"),
    dict(type="CheckLabels"),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True, backend="pillow"),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="ReadImage"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True, backend="pillow"),
    dict(type="LoadAnnotations"),  # after Resize: scored at the labels' own resolution
    dict(type="CheckLabels"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="ChallengeADE20K",
        data_root=data_root,
        classes=classes,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ChallengeADE20K",
        data_root=data_root,
        classes=classes,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type="ExactIoU")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / warmup, by_epoch=False, begin=0, end=warmup),
    dict(type="CosineAnnealingLR", T_max=max_iters - warmup, eta_min=0.0, by_epoch=False, begin=warmup, end=max_iters),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters + 1)
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2_000, max_keep_ckpts=1),
)
custom_hooks = [dict(type="PlainCheckpoint")]
log_processor = dict(by_epoch=False)
