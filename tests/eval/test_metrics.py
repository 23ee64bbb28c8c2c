"""Metrics against what mmsegmentation and DINOv3 return (tests/data/reference), and by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_value.eval.depth import METRICS, depth_metrics, eigen_crop
from dino_value.eval.seg import confusion_matrix, scores_of

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def test_iou_agrees_with_mmsegmentation() -> None:
    with np.load(REFERENCE / "miou.npz") as reference:
        classes = int(reference["classes"])
        labels = torch.from_numpy(reference["truth"]).long()
        prediction = torch.from_numpy(reference["prediction"]).long()
        # In two parts, as an evaluation adds them up.
        confusion = confusion_matrix(prediction[:2], labels[:2], classes)
        confusion += confusion_matrix(prediction[2:], labels[2:], classes)
        names = [str(index) for index in range(classes)]
        scores = scores_of(confusion, names)
        iou = np.array([scores[f"iou/{name}"] for name in names])
        np.testing.assert_allclose(iou, reference["iou_per_class"], atol=1e-6)
        assert scores["miou"] == pytest.approx(np.nanmean(reference["iou_per_class"]), abs=1e-6)
        assert scores["macc"] == pytest.approx(np.nanmean(reference["acc_per_class"]), abs=1e-6)
        assert scores["aacc"] == pytest.approx(float(reference["aacc"]), abs=1e-6)


def test_a_class_that_is_nowhere_does_not_count() -> None:
    confusion = torch.tensor([[3, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = scores_of(confusion, "abcd")
    assert scores["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert scores["macc"] == pytest.approx((3 / 4 + 1) / 2)
    assert math.isnan(scores["iou/c"])


def test_depth_metrics_agree_with_dinov3() -> None:
    names = {"rmse": "rmse", "absrel": "abs_rel", "delta1": "a1", "delta2": "a2", "delta3": "a3"}
    names |= {"log10": "log_10", "silog": "silog"}
    with np.load(REFERENCE / "depth_metrics.npz") as reference:
        truth, prediction = (torch.from_numpy(reference[key]) for key in ("truth", "prediction"))
        ours = depth_metrics(prediction, truth, truth > 0)
        for column, metric in enumerate(METRICS):
            np.testing.assert_allclose(ours[:, column], reference[names[metric]], rtol=1e-6, atol=1e-6, err_msg=metric)


def test_masked_pixels_do_not_count_and_empty_images_are_nan() -> None:
    truth = torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 0.0]]])
    prediction = torch.tensor([[[1.0, 4.0, 9.0]], [[1.0, 1.0, 1.0]]])
    metrics = depth_metrics(prediction, truth, truth > 0)
    row = dict(zip(METRICS, metrics[0].tolist(), strict=True))
    assert row["rmse"] == pytest.approx(math.sqrt(2))
    assert row["absrel"] == pytest.approx(0.5)
    assert row["delta1"] == 0.5
    assert metrics[1].isnan().all()


def test_eigen_crop() -> None:
    mask = eigen_crop(480, 640)
    assert mask.sum() == (471 - 45) * (601 - 41)
    assert mask[45, 41]
    assert mask[470, 600]
    assert not mask[44].any()
    assert not mask[:, 601].any()
    assert eigen_crop(48, 64).float().mean().item() == pytest.approx(mask.float().mean().item(), abs=0.02)
