"""Batches follow from (seed, stream, step), whatever the workers and wherever a run begins."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_value.config import ViewsConfig
from dino_value.data import sampling
from dino_value.data.sampling import Stream, generator, key
from dino_value.data.views import FolderViews
from dino_value.errors import UserError

ROOT = Path(__file__).parents[2]


class Numbers:
    """Items are their own positions; the second tensor says which key drew the batch."""

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, positions: Sequence[int], key: int) -> tuple[Tensor, ...]:
        draws = torch.rand(len(positions), generator=torch.Generator().manual_seed(key))
        return torch.tensor(positions), draws


def test_keys_tell_their_parts_apart() -> None:
    keys = [key(0), key(1), key(0, 1), key(0, "a"), key(0, "b"), key(0, "a", 1), key(0, 1, "a"), key(0, "a", 2)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)
    assert key(3, "a", 1) == key(3, "a", 1)


def test_keys_do_not_change_between_versions() -> None:
    """A resumed run must draw what it would have drawn: the numbers are part of the format."""
    assert key(0, "unlabeled", 0) == 3793263147400267698


def test_generators_follow_their_keys() -> None:
    first, again, other = (torch.rand(3, generator=generator(0, name)) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (9, 3), (4, 4)])
def test_a_pass_visits_every_item_once(count: int, batch: int) -> None:
    stream = Stream(Numbers(count), batch, 0, "unlabeled")
    for epoch in range(3):
        steps = range(epoch * stream.per_epoch, (epoch + 1) * stream.per_epoch)
        seen = torch.cat([stream.indices(step) for step in steps]).tolist()
        assert len(seen) == len(set(seen)) == count // batch * batch
        assert set(seen) <= set(range(count))


def test_passes_are_shuffled_differently() -> None:
    stream = Stream(Numbers(64), 64, 0, "unlabeled")
    assert not torch.equal(stream.indices(0), stream.indices(1))
    assert not torch.equal(stream.indices(0), torch.arange(64))


def test_streams_and_seeds_are_independent() -> None:
    def order(seed: int, name: str) -> list[int]:
        return Stream(Numbers(64), 32, seed, name).indices(0).tolist()

    assert order(0, "unlabeled") == order(0, "unlabeled")
    assert order(0, "unlabeled") != order(0, "meta unlabeled")
    assert order(0, "unlabeled") != order(1, "unlabeled")


def same(left: list[tuple[Tensor, ...]], right: list[tuple[Tensor, ...]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_starting_in_the_middle_gives_the_same_batches() -> None:
    stream = Stream(Numbers(), 3, 0, "unlabeled")
    whole = list(stream.iterate(0, 8))
    assert same(whole[5:], list(stream.iterate(5, 8)))
    assert same(whole, [stream.batch(step) for step in range(8)])
    assert list(stream.iterate(8, 8)) == []


def test_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    first = Stream(Numbers(), 3, 0, "unlabeled").batch(2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same([first], [Stream(Numbers(), 3, 0, "unlabeled").batch(2)])
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_items_than_a_batch() -> None:
    with pytest.raises(UserError, match="10 images are fewer than a batch of 11"):
        Stream(Numbers(10), 11, 0, "unlabeled")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six noise images, 20 × 24 pixels."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return paths


SETTINGS = ViewsConfig(global_size=16, local_size=8, local_count=2)


def test_workers_change_nothing(images: list[Path]) -> None:
    def batches(workers: int) -> list[tuple[Tensor, ...]]:
        stream = Stream(FolderViews(images, SETTINGS), 2, 0, "unlabeled", workers)
        return list(stream.iterate(1, 6))

    alone = batches(0)
    assert [part.shape for part in alone[0]] == [(2, 2, 3, 16, 16), (2, 2, 3, 8, 8)]
    assert same(alone, batches(2))


def test_signals_to_the_group_are_not_for_workers() -> None:
    """In a process of its own, as training is: a server that an earlier test has started would hear them."""
    script = "from tests.data.test_sampling import signal_the_group; signal_the_group()"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


def signal_the_group() -> None:
    """SLURM sends them to every process of a job; the training process must still get its batches to finish a step."""
    stream = Stream(Numbers(), 3, 0, "unlabeled", workers=2)
    others = multiprocessing.active_children()
    batches = stream.iterate(0, 40)  # more than are prepared ahead
    first = next(batches)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    server, tracker = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid  # type: ignore
    assert len(workers) == 2
    for process in (*(worker.pid for worker in workers), server, tracker):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(process, number)
    assert same([first, *batches], [stream.batch(step) for step in range(40)])


def test_an_open_stream_does_not_keep_a_process_from_ending() -> None:
    others = multiprocessing.active_children()
    batches = Stream(Numbers(), 3, 0, "unlabeled", workers=1).iterate(0, 40)
    next(batches)
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    worker.terminate()  # what the interpreter does at its end, and then waits
    worker.join(0.2)
    assert worker.is_alive()
    sampling._end()
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL


def test_a_mistake_found_by_a_worker_is_still_one_clear_line(images: list[Path]) -> None:
    for path in images:
        path.write_bytes(b"not an image")
    messages = []
    for workers in (0, 1):
        stream = Stream(FolderViews(images, SETTINGS), 2, 0, "unlabeled", workers)
        with pytest.raises(UserError) as caught:
            list(stream.iterate(0, 1))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "cannot be read as an image" in messages[0]
    assert "\n" not in messages[0]
