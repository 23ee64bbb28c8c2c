"""Weighted k-NN against DINO's record and against loops written from the paper."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_value.eval.knn import knn_predict

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def naive_votes(train: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float, classes: int) -> list[float]:
    """One query's votes: sort all cosines, add exp(cosine / T) of the first k to their classes."""
    cosines = [float(row @ query / (row.norm() * query.norm())) for row in train.double()]
    nearest = sorted(range(len(train)), key=lambda index: -cosines[index])[:k]
    votes = [0.0] * classes
    for index in nearest:
        votes[int(labels[index])] += math.exp(cosines[index] / temperature)
    return [vote / sum(votes) for vote in votes]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (7, 1.0), (30, 0.2)])
def test_votes_are_those_of_plain_loops(k: int, temperature: float, generator: torch.Generator) -> None:
    train, queries = (torch.randn(n, 6, generator=generator) * 3 for n in (30, 11))
    labels = torch.randint(0, 4, (30,), generator=generator)
    found = knn_predict(train, labels, queries, k, temperature, classes=5, chunk=4)
    expected = [naive_votes(train, labels, query, k, temperature, 5) for query in queries.double()]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-4)
    assert found.shape == (11, 5)


def test_top1_is_the_published_codes() -> None:
    with np.load(REFERENCE / "knn.npz") as reference:
        train, queries = torch.from_numpy(reference["train"]), torch.from_numpy(reference["test"])
        labels, truth = torch.from_numpy(reference["train_label"]), torch.from_numpy(reference["test_label"])
        for k, top1 in zip(reference["k"].tolist(), reference["top1"].tolist(), strict=True):
            votes = knn_predict(train, labels, queries, k, float(reference["temperature"]))
            assert (votes.argmax(1) == truth).double().mean().item() * 100 == pytest.approx(top1)


def test_what_cannot_vote_is_refused() -> None:
    train, labels = torch.eye(3), torch.arange(3)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k={k} neighbours out of 3 training features"):
            knn_predict(train, labels, train, k)
    with pytest.raises(ValueError, match="do not pair up"):
        knn_predict(train, labels[:2], train, 1)
    with pytest.raises(ValueError, match="do not pair up"):
        knn_predict(train, labels, torch.zeros(2, 4), 1)
    assert knn_predict(train, labels, train[:0], 1).shape == (0, 3)
