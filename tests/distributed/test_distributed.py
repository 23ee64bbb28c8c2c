"""Two processes that share a batch (gloo) against one that has all of it, and how processes meet, agree and part."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dino_value.arguments import exit_code
from dino_value.config import Config, load_config
from dino_value.distributed import group as distributed
from dino_value.distributed.fsdp import check_sharding, collect
from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.errors import EXIT_DONE, EXIT_LOST, EXIT_RESUMABLE, EXIT_USER, UserError
from dino_value.models.backbone import load_backbone
from dino_value.models.weight_files import read_weights
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.training.trainer import Trainer, train

TIMING = ("images_per_second", "data_wait", "seconds", "cpu_seconds")
ALL = ["objective.centering=sinkhorn", "objective.koleo=0.1", "objective.gram.weight=1", "objective.gram.level=batch"]
BEST = ["designer.name=unet+best_of_n", "designer.candidates=2"]
JEPA = ["objective.name=ijepa", "views.local_count=0", "views.global_size=32", "objective.ijepa.context_least=1"]
# Not AdamW, whose steps along what is nothing but rounding (the last bias, before the heads' batch norm) are full ones.
SGD = ["value.lookahead.optimizer=sgd", "value.lookahead.lr=0.05"]
MOVED = ["designer=targets", "value.direction=lookahead", "value.lookahead.steps=3", *SGD]
CASES = {
    "baseline": ["method=baseline"],
    "value": ["value.engine=finite_difference"],
    "double backward": ["value.engine=double_backward", "value.direction=cosine"],
    "DINOv3": [*ALL, "objective.ibot.weight=1", "designer.through_teacher=true", "value.engine=double_backward"],
    "batch norm, noise, all crops": ["objective.batch_norm=true", "designer.fill=noise", "designer.crops=all"],
    "closed forms": [*BEST, "feedback.refresh=2", "value.diagnose=1", "feedback.seg.held=2", "feedback.depth.held=1"],
    "weights": ["designer=weights", "value.radius=1e-2"],
    "I-JEPA": [*JEPA, "objective.ijepa.width=12", "objective.ijepa.heads=3", "objective.ijepa.depth=1"],
    "targets along a lookahead": [*MOVED, "views.global_size=32", "objective.ibot.weight=1"],
    "masks and targets along a contrast": [
        *MOVED,
        "designer=unet+targets",
        "value.lookahead.contrast=true",
        "value.lookahead.batches=2",
        "value.engine=finite_difference",
    ],
    "points along a lookahead": [
        *MOVED,
        *JEPA,
        "objective.ijepa.width=12",
        "objective.ijepa.heads=3",
        "objective.ijepa.depth=1",
        "optim.lr=0",  # Adam's first step would magnify the rounding of a fresh predictor's small gradients
    ],
    "targets along a gradient": ["designer=targets", "value.direction=dot"],
    "oracle": ["method=oracle", *MOVED[1:]],
}
SHARD = ["distributed.strategy=fsdp"]
SHARDED = {
    "value": CASES["value"],
    "double backward": CASES["double backward"],
    "DINOv3": [*CASES["DINOv3"], "backbone.checkpointing=true"],
    "I-JEPA": CASES["I-JEPA"],
    "adam": ["value.direction=adam", "value.burn_in=20", "value.period=1", "value.engine=finite_difference"],
    "frozen": ["method=baseline", "objective.freeze_last_layer=9", "optim.freeze_backbone=1", "optim.layer_decay=0.5"],
    "accumulated": ["method=baseline", "optim.batch_size=8", "optim.accumulate=2"],
    "bf16": ["precision=bf16", "value.engine=finite_difference"],
}
STEPS = 2


def steps(config: Config, count: int = STEPS) -> dict[str, Any]:
    """What a few steps leave behind: gradients of θ and φ (the last), and all of the state."""
    if config.value.direction == "adam":
        config.value.burn_in = 1  # fewer than a run may have: moments of one step are enough to compare
    run = Trainer(config)
    for large, small in run.stream.iterate(0, count):
        run.learner_update(large, small)
    run.meters.average()
    modules = {"θ": run.student} | ({"φ": run.steer.designer} if run.steer and run.steer.designer else {})
    gradients = {
        name: {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
        for name, module in modules.items()
    }
    return collect({"gradients": gradients, "state": run.state_dict()})


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in sorted(tree.items(), key=lambda item: str(item[0])):  # a header's order is nobody's promise
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        for place, value in enumerate(tree):
            yield from leaves(value, f"{path}.{place}")
    else:
        yield path.lstrip("."), tree


def same(left: Any, right: Any) -> None:
    """Bit for bit."""
    for (path, a), (other, b) in zip(leaves(left), leaves(right), strict=True):
        assert path == other
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, path


def close(found: Any, expected: Any, relative: float) -> None:
    """Every tensor to `relative` of its largest entry; tensors of nothing but rounding do not count."""
    for (path, a), (other, b) in zip(leaves(found), leaves(expected), strict=True):
        assert path == other
        if isinstance(a, float):
            assert a == pytest.approx(b, rel=1e-4), path
        elif not isinstance(a, Tensor):
            assert a == b, path
        elif a.numel() and float(b.abs().max()) > 1e-7:
            torch.testing.assert_close(a, b, rtol=0, atol=relative * float(b.abs().max()), msg=lambda m, p=path: p + m)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def clean_forks() -> Any:
    """Processes that begin with the imports done, once for all tests."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["dino_value.training.trainer"])
    return context


# The same step


def child(rank: int, yaml: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {name: steps(load_config(yaml, [f"out={folder}/out", *case])) for name, case in CASES.items()}
    accumulated = [*CASES["value"], "optim.batch_size=8", "optim.accumulate=2"]
    found["accumulated"] = steps(load_config(yaml, [f"out={folder}/out", *accumulated]))
    for name, case in SHARDED.items():
        found[f"sharded {name}"] = steps(load_config(yaml, [f"out={folder}/out", *SHARD, *case]))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    clean_forks()
    mp.start_processes(child, (str(tiny_yaml), str(folder)), 2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow  # starts two interpreters
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(both: list[dict[str, Any]], tiny: Callable[..., Config], case: str) -> None:
    first, second = (found[case] for found in both)
    alone = steps(tiny(*CASES[case]))
    same(first["state"], second["state"])  # or they would drift apart
    same(first["gradients"], second["gradients"])
    for part in ("θ", "φ"):
        close(first["gradients"].get(part), alone["gradients"].get(part), 2e-3)
    # Loss, V, cosine, norms of gradients and the rest; not an engine's error, which is of each one's own images.
    sums = [{**found["state"]["meters"]["sums"], "engine_error": 0.0} for found in (first, alone)]
    assert ({"gradient_norm"} if case == "oracle" else {"loss", "gradient_norm"}) <= sums[0].keys()
    close(*sums, 1e-3)
    # Adam makes a step of full length of a gradient that is nothing but rounding: biases before batch norm, of DINO's
    # head or of the feedback's heads (the oracle's u), and of attention, which moved targets leave hardly a gradient.
    rounding = "batch norm" in case or case in ("oracle", "targets along a gradient")
    for part in () if rounding else ("student", "teacher", "objective"):
        close(first["state"][part], alone["state"][part], 2e-3)


@pytest.mark.slow
def test_two_processes_that_accumulate(both: list[dict[str, Any]], tiny: Callable[..., Config]) -> None:
    alone = steps(tiny(*CASES["value"], "optim.batch_size=8"))
    close(both[0]["accumulated"]["gradients"], alone["gradients"], 2e-3)
    close(both[0]["accumulated"]["state"]["student"], alone["state"]["student"], 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_two_processes_that_share_the_learner_take_the_step_of_one(
    both: list[dict[str, Any]], tiny: Callable[..., Config], case: str
) -> None:
    found = both[0][f"sharded {case}"]
    whole = both[0][case] if case in CASES else steps(tiny(*SHARDED[case]))
    assert found["gradients"].keys() == whole["gradients"].keys()
    if case == "bf16":  # sums in another order agree to what this precision can
        close(*({"loss": each["state"]["meters"]["sums"]["loss"]} for each in (found, whole)), 1e-2)
        one, other = (torch.cat([g.flatten() for g in each["gradients"]["θ"].values()]) for each in (found, whole))
        assert float((one - other).norm() / other.norm()) < 5e-2
        return
    close(found["gradients"], whole["gradients"], 2e-3)
    sums = [{**each["state"]["meters"]["sums"], "engine_error": 0.0} for each in (found, whole)]
    assert {"loss", "gradient_norm"} <= sums[0].keys()
    close(*sums, 1e-3)
    for part in ("student", "teacher", "objective", "optimizer"):
        close(found["state"][part], whole["state"][part], 2e-3)


ACCUMULATED = {
    "centre, sinkhorn, iBOT, Gram": ["objective.ibot.weight=1", "objective.gram.weight=1"],
    "sinkhorn": ["objective.centering=sinkhorn"],
    "best of n": BEST,
    "I-JEPA": CASES["I-JEPA"],
}


@pytest.mark.parametrize("case", ACCUMULATED)
def test_accumulated_passes_are_the_step_of_the_whole_batch(tiny: Callable[..., Config], case: str) -> None:
    found, whole = (steps(tiny(*ACCUMULATED[case], f"optim.accumulate={passes}")) for passes in (2, 1))
    close(found["gradients"], whole["gradients"], 2e-3)
    close(found["state"]["objective"], whole["state"]["objective"], 1e-4)
    assert found["state"]["steer"]["updates"] == whole["state"]["steer"]["updates"] == 1  # at the step's boundary


def test_parts() -> None:
    assert [WHOLE.of(5), BatchShard(0, 2).of(5), BatchShard(1, 2).of(5)] == [slice(0, 5), slice(0, 2), slice(2, 5)]
    rows = torch.arange(12)  # three views of four images
    assert BatchShard(1, 2).rows(rows, 3).tolist() == [2, 3, 6, 7, 10, 11]
    assert BatchShard(1, 2).rows(rows[:0], 0).numel() == 0
    assert torch.equal(
        torch.cat([part.rows(rows, 1) for part in BatchShard(1, 2).split(3)]), BatchShard(1, 2).rows(rows, 1)
    )  # parts of a part


# A run of two


def work(rank: int, count: int, port: str, yaml: str, overrides: list[str], fault: str | None, log: str) -> None:
    """`dino-value train` as a launcher starts it; something may happen to process 1 at step 2."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = Trainer.learner_update

    def update(run: Trainer, large: Tensor, small: Tensor) -> None:
        if fault and rank == 1 and run.step == 2:
            if fault == "an error":
                raise UserError("a broken image")
            os.kill(os.getpid(), {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}[fault])
        before(run, large, small)

    Trainer.learner_update = update  # type: ignore[method-assign]
    with open(log, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        sys.exit(exit_code(lambda: EXIT_DONE if train(load_config(yaml, overrides), quiet=True) else EXIT_USER))


Start = Callable[..., tuple[list[int | None], list[str]]]


@pytest.fixture
def start(tiny_yaml: Path, tmp_path: Path) -> Iterator[Start]:
    """Start processes, wait for them: their exit codes and what they said."""
    processes: list[Any] = []

    def run(*each: list[str], count: int = 2, fault: str | None = None) -> tuple[list[int | None], list[str]]:
        port, spawn = free_port(), clean_forks()
        logs = [str(tmp_path / f"log{rank}") for rank in range(len(each))]
        started = [
            spawn.Process(target=work, args=(rank, count, port, str(tiny_yaml), overrides, fault, logs[rank]))
            for rank, overrides in enumerate(each)
        ]
        processes.extend(started)
        for process in started:
            process.start()
        for process in started:
            process.join(300)
        return [process.exitcode for process in started], [Path(log).read_text() for log in logs]

    yield run
    for process in processes:
        process.kill()


def rows(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in read_metrics(folder)]


@pytest.mark.slow
def test_a_stop_of_one_is_a_stop_of_all_and_goes_on_bit_for_bit(
    start: Start, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    given = ["value.engine=finite_difference", "log_every=3", "checkpoint.every=9"]
    whole, cut, alone = (tmp_path / name for name in ("whole", "cut", "alone"))
    # Uninterrupted but for the checkpoint of the same step.
    assert start(*[[f"out={whole}", *given, "checkpoint.every=3"]] * 2)[0] == [EXIT_DONE] * 2
    codes, said = start(*[[f"out={cut}", *given]] * 2, fault="SIGTERM")
    assert codes == [EXIT_RESUMABLE] * 2
    assert sorted(map(len, said))[0] == 0, said  # said once
    assert "stopped at step 3 of 4" in "".join(said)
    shutil.copytree(cut, alone)
    assert start(*[[f"out={cut}", *given]] * 2)[0] == [EXIT_DONE] * 2
    same(load_checkpoint(cut), load_checkpoint(whole))
    assert rows(cut) == rows(whole)
    assert [row["step"] for row in rows(cut)] == [3, 4]
    # A checkpoint of two goes on with one.
    train(tiny(f"out={alone}", *given), quiet=True)
    close(load_checkpoint(alone)["student"], load_checkpoint(whole)["student"], 2e-3)
    # And that of one with two.
    back = tmp_path / "back"
    train(tiny(f"out={back}", *given, "checkpoint.every=2"), quiet=True)
    (back / "checkpoints" / "step_00000004.pt").unlink()
    assert start(*[[f"out={back}", *given]] * 2)[0] == [EXIT_DONE] * 2
    close(load_checkpoint(back)["student"], load_checkpoint(whole)["student"], 2e-3)


@pytest.mark.slow
def test_a_shared_learner_goes_on_bit_for_bit_and_with_any_number(
    start: Start, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    given = ["value.engine=finite_difference", "log_every=2", "health.every=2", "health.images=4"]
    whole, cut, alone, back = (tmp_path / name for name in ("whole", "cut", "alone", "back"))
    codes, said = start(*[[f"out={whole}", *given, *SHARD]] * 2)
    assert codes == [EXIT_DONE] * 2, said
    assert said == ["", ""]
    for copied in (cut, alone):
        shutil.copytree(whole, copied)
        (copied / "checkpoints" / "step_00000004.pt").unlink()
    (cut / "backbone.safetensors").unlink()
    assert start(*[[f"out={cut}", *given, *SHARD]] * 2)[0] == [EXIT_DONE] * 2
    same(load_checkpoint(cut), load_checkpoint(whole))
    assert rows(cut) == rows(whole)
    same(read_weights(cut / "backbone.safetensors"), read_weights(whole / "backbone.safetensors"))
    # One process holds all of it; and what it wrote, two share again.
    train(tiny(f"out={alone}", *given), quiet=True)
    for part in ("student", "teacher", "optimizer"):
        close(load_checkpoint(alone)[part], load_checkpoint(whole)[part], 2e-3)
    assert load_backbone(alone).model.state_dict().keys() == load_backbone(whole).model.state_dict().keys()
    train(tiny(f"out={back}", *given), quiet=True)
    (back / "checkpoints" / "step_00000004.pt").unlink()
    assert start(*[[f"out={back}", *given, *SHARD]] * 2)[0] == [EXIT_DONE] * 2
    close(load_checkpoint(back)["student"], load_checkpoint(whole)["student"], 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "an error"])
def test_a_lost_process_is_named_by_the_others(start: Start, tmp_path: Path, fault: str) -> None:
    codes, said = start(*[[f"out={tmp_path / 'run'}", "method=baseline"]] * 2, fault=fault)
    words = "is gone: no sign of life" if fault == "SIGKILL" else "ended: a broken image"
    assert re.search(rf"error: process 1 of 2 \(.+\) {words}; the same command goes on from the last", said[0])
    assert codes == [EXIT_LOST, -signal.SIGKILL if fault == "SIGKILL" else EXIT_USER]


@pytest.mark.slow
def test_processes_with_different_settings_or_a_batch_they_cannot_share(start: Start, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    codes, said = start([out, "optim.lr=1e-3"], [out, "optim.lr=2e-3", "device=cpu"])
    assert codes == [EXIT_USER] * 2
    expected = "error: processes 0 and 1 have different settings (optim.lr: 0.001 and 0.002); start all alike\n"
    assert sorted(said) == ["", expected]
    codes, said = start(*[[out, "optim.batch_size=6", "optim.accumulate=2"]] * 2)
    assert codes == [EXIT_USER] * 2
    expected = "optim.batch_size=6 is the batch of all 2 processes times optim.accumulate=2: choose a multiple, 4 or 8"
    assert sorted(said) == ["", f"error: {expected}\n"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_come(start: Start, tmp_path: Path) -> None:
    codes, said = start(*[[f"out={tmp_path / 'run'}", "distributed.timeout=3"]] * 2, count=3)
    assert codes == [EXIT_USER] * 2
    assert "2 of 3 processes came within 3 s; missing: 2. Look at their logs, or raise distributed.timeout" in said[0]


def test_nobody_at_the_address(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"process 1 of 2 .*: no store at 127\.0\.0\.1:\d+ within 1 s"):
        train(tiny("distributed.timeout=1"))
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="WORLD_SIZE=2, but 'RANK': start the processes with torchrun"):
        train(tiny())


@pytest.mark.slow
def test_torchrun_leaves_no_process_behind(tiny_yaml: Path, tmp_path: Path) -> None:
    """The command of the documentation, and one worker killed from outside."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["--no-python", str(Path(sys.executable).with_name("dino-value"))]
    command += ["train", str(tiny_yaml), f"out={tmp_path / 'run'}", "method=baseline", "steps=100000", "data.workers=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)

    def running() -> list[tuple[int, str]]:
        listed = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
        found = [line.split(None, 1) for line in listed[1:]]
        return [(int(pid), text) for pid, text in found if f"out={tmp_path}" in text and "<def" not in text]

    try:
        until = time.monotonic() + 60
        while not read_metrics(tmp_path / "run") and time.monotonic() < until:
            time.sleep(0.2)
        workers = [pid for pid, text in running() if "torch.distributed.run" not in text]
        assert len(workers) == 2
        os.kill(max(workers), signal.SIGKILL)
        said = launcher.communicate(timeout=120)[1]  # torchrun gives the other half a minute
        assert launcher.returncode != 0, said
        until = time.monotonic() + 20
        while running() and time.monotonic() < until:
            time.sleep(0.2)
        assert running() == []
    finally:
        for pid, _ in running():  # workers have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()


def test_alone_everything_is_the_identity() -> None:
    rows, module = torch.randn(3, 2), torch.nn.Linear(2, 2)
    assert (distributed.world(), distributed.rank(), distributed.own_part()) == (1, 0, WHOLE)
    assert distributed.is_first()
    assert distributed.gather(rows, 3) is rows
    assert distributed.from_first(lambda: 3) == 3
    assert distributed.anywhere(True)
    assert not distributed.anywhere(False)
    assert distributed.own_device("cuda") == "cuda"
    whole = distributed.shared(module)
    assert torch.equal(whole(lambda learner, x: learner(x), rows), module(rows))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.accumulate=0", "optim.accumulate=0: must be at least 1"),
        ("optim.accumulate=3", "optim.accumulate=3 passes cannot share optim.batch_size=4 equally"),
        ("distributed.timeout=0", "distributed.timeout=0.0: must be above 0"),
    ],
)
def test_bad_settings(tiny: Callable[..., Config], override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        tiny(override)


@pytest.mark.parametrize("name", ["weights", "targets", "unet+best_of_n", "attention"])
def test_designers_that_need_the_whole_learner_at_every_step(tiny: Callable[..., Config], name: str) -> None:
    check_sharding(tiny("designer=unet", "distributed.strategy=fsdp"))
    with pytest.raises(UserError, match=rf"distributed.strategy=fsdp: designer.name={re.escape(name)} .*ddp"):
        check_sharding(tiny(f"designer={name}"))


def test_an_error_is_printed_with_its_code() -> None:
    def lose() -> int:
        raise distributed.ProcessLost("process 1 is gone")

    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert exit_code(lose) == EXIT_LOST
    assert said.getvalue() == "error: process 1 is gone\n"
