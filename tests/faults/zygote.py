"""A process that has imported everything once, and forks a training process for each order it reads.

An order is a line of JSON: `arguments` of `dino-value`, `log` (a file for what is printed), and what goes wrong:
`kill_at`: SIGKILL at the n-th moment of writing (before and after every fsync, rename and removal, and with half of a
file's bytes on the disk); `file_limit`: no file may grow beyond so many bytes; `unprivileged`: permissions count for
root too; `watch`: a file for memory, open files and threads at every step. Two lines answer: the process's id, and when
it has ended its exit code, negative for a signal.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dino_value import cli
from dino_value.models import backbone as backbones
from dino_value.runs.metrics import MetricsFile
from dino_value.training.trainer import Trainer


def kill_at(count: int) -> None:
    """Die at the `count`-th moment of writing."""
    left = [count]

    def moment() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            moment()
            result = call(*arguments, **named)
            moment()
            return result

        return wrapped

    def halves(file: Any, content: Any) -> None:
        middle = len(content) // 2
        file.write(content[:middle])
        file.flush()
        moment()
        file.write(content[middle:])

    save, save_file, write = torch.save, backbones.save_file, MetricsFile.write

    def torn_save(state: Any, file: Any) -> None:
        buffer = io.BytesIO()
        save(state, buffer)
        halves(file, buffer.getvalue())

    def torn_weights(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata=metadata)
        content = path.read_bytes()
        with open(path, "wb") as file:
            halves(file, content)

    def torn_row(self: MetricsFile, step: int, values: Any) -> None:
        kept, self._file = self._file, io.StringIO()  # type: ignore[assignment]
        write(self, step, values)
        row, self._file = self._file.getvalue(), kept  # type: ignore[attr-defined]
        halves(self._file, row)

    torch.save, backbones.save_file = torn_save, torn_weights
    MetricsFile.write = torn_row  # type: ignore[method-assign]
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, around(getattr(os, name)))


def drop_privileges() -> None:
    """Give up every capability: root then is a user like others (capset(2))."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def watch(path: str) -> None:
    """Append [resident KiB, open files, threads] at every step."""
    update, file = Trainer.learner_update, open(path, "w")  # noqa: SIM115 (closed with the process)

    def updated(self: Trainer, *batch: Any) -> None:
        update(self, *batch)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = [pages * resource.getpagesize() // 1024, len(os.listdir("/proc/self/fd")), threading.active_count()]
        file.write(json.dumps(row) + "\n")
        file.flush()

    Trainer.learner_update = updated  # type: ignore[method-assign]


def child(order: dict[str, Any]) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "kill_at" in order:
        kill_at(order["kill_at"])
    if "file_limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
    if order.get("unprivileged"):
        drop_privileges()
    if "watch" in order:
        watch(order["watch"])
    return cli.main(order["arguments"])


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
