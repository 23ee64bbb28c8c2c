"""What a file or a setting may not do: run code, write elsewhere, reach the network."""

from __future__ import annotations

import ast
import io
import os
import pickle
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dino_value import cli
from dino_value.config import Config, load_config
from dino_value.data.revisited import open_revisited
from dino_value.data.tars import list_members
from dino_value.errors import UserError
from dino_value.slurm import launch
from dino_value.training.trainer import train

ROOT = Path(__file__).parents[1]
SOURCES = [path for room in ("dino_value", "heads", "eval", "slurm", "configs") for path in (ROOT / room).rglob("*.py")]


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What must not be there in the end; that the payload works is seen first."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "works")))
    assert (tmp_path / "works").is_dir()
    return tmp_path / "executed"


def test_no_pickle_is_executed(mark: Path, tmp_path: Path, tiny: Callable[..., Config], tiny_yaml: Path) -> None:
    payload = Payload(mark)
    for name in ("weights.pth", "weights.bin", "dino.pth"):
        for content in (payload, {"teacher": payload}, {"state_dict": {"w": torch.zeros(1), "x": payload}}):
            torch.save(content, tmp_path / name)
            with pytest.raises(UserError):
                train(tiny("method=baseline", f"backbone.weights={tmp_path / name}"), quiet=True)
            with pytest.raises(UserError):
                train(tiny("method=baseline", f"objective.head={tmp_path / name}"), quiet=True)
            with pytest.raises(UserError):
                train(tiny("method=baseline", f"start_from={tmp_path / name}"), quiet=True)
            assert cli.main(["replay", str(tmp_path / name)]) == 2
            (tmp_path / name).write_bytes(pickle.dumps(content))  # not even a zip
            with pytest.raises(UserError):
                train(tiny("method=baseline", f"backbone.weights={tmp_path / name}"), quiet=True)
    checkpoint = train(tiny("method=baseline", "steps=2"), quiet=True) / "checkpoints" / "step_00000002.pt"
    torch.save({**torch.load(checkpoint, weights_only=True), "collapse": payload}, checkpoint)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        train(tiny("method=baseline", "steps=2"), quiet=True)
    (tmp_path / "roxford5k").mkdir()
    (tmp_path / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": payload}))
    with pytest.raises(UserError, match="refused, and nothing of it was run"):
        open_revisited(tmp_path, "roxford5k")
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["apply:os.mkdir", "new:os.mkdir", "object/apply:os.mkdir"])
def test_yaml_makes_no_objects(mark: Path, tmp_path: Path, tiny: Callable[..., Config], tag: str) -> None:
    path = tmp_path / "config.yaml"
    tag = tag if tag.startswith("object") else f"object/{tag}"
    path.write_text(f"method: !!python/{tag} ['{mark}']\n")
    with pytest.raises(UserError):
        load_config(path)
    with pytest.raises(UserError):
        load_config(path, [f"out=!!python/{tag} ['{mark}']"])
    assert not mark.exists()


def test_shards_write_nothing(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    shard = tmp_path / "data" / "a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as file:
        for name in ("../outside.png", f"{tmp_path}/absolute.png", "inside.png"):
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            file.addfile(info, io.BytesIO(buffer.getvalue()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    members = list_members(shard)
    assert all(member.read_bytes() == buffer.getvalue() for member in members)
    assert len(members) == 3  # a link leads nowhere
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "data"]


def test_a_launcher_builds_no_shell_from_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit pickles the arguments; its scripts hold paths only."""
    monkeypatch.chdir(tmp_path)
    texts = ["out=$(touch pwned)", "seed=`touch pwned`", "x;touch pwned", "'\ntouch pwned\n'"]
    folder = tmp_path / "jobs"
    with pytest.raises(UserError):  # seen before anything is submitted
        launch.main(["rooms/cpu", *texts, "--cluster", "local", "--folder", str(folder)])
    (job,) = launch.submit([["train", "rooms/cpu", *texts]], launch.Resources(), folder, "local")
    assert job.exception() is not None
    scripts = [path.read_text(errors="replace") for path in folder.rglob("*.sh")]
    assert not any("pwned" in text for text in scripts)
    assert not (tmp_path / "pwned").exists()


def test_nothing_phones_home(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def refuse(*arguments: Any, **named: Any) -> None:
        called.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    train(tiny("health.every=2", "health.images=4"), quiet=True)
    assert not called


# The sources themselves


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def named(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_sources_call_nothing_dangerous(path: Path) -> None:
    forbidden = {
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
    }
    forbidden |= {"joblib.load", "shutil.unpack_archive", "marshal.loads", "shelve.open", "torch.hub.load"}
    for name, call in calls(path):
        assert name not in forbidden, f"line {call.lineno}: {name}"
        assert not name.endswith(".extractall"), f"line {call.lineno}: {name}"
        if name == "torch.load":
            assert named(call, "weights_only") == "True", f"line {call.lineno}"
        if name in ("np.load", "numpy.load"):
            assert named(call, "allow_pickle") in (None, "False"), f"line {call.lineno}"
        if name.startswith("subprocess."):
            assert named(call, "shell") in (None, "False"), f"line {call.lineno}"
        if name.endswith("create_model"):
            local = bool(call.args) and "local-dir:" in ast.unparse(call.args[0])
            assert local or named(call, "pretrained") in (None, "False"), f"line {call.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_sources_have_no_network(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in (
                "requests",
                "urllib",
                "http",
                "ftplib",
                "smtplib",
                "aiohttp",
                "httpx",
                "boto3",
            )
