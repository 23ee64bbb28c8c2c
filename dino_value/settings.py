"""Every setting with its default, choices, bounds and a sentence: `dino-value help KEY`, docs/settings.md.

The sentence is the comment beside, or above, the field in the source of its dataclass: one place to write it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from omegaconf import MISSING

from dino_value import plugins
from dino_value.config import CHOICES, MASKS, RESERVED, Config, bounds
from dino_value.errors import UserError


class Setting(NamedTuple):
    key: str
    type: str
    default: str
    text: str
    """From the source; empty where the name says it."""
    allowed: str
    """Choices or bounds; empty where any value of the type will do."""


def settings(schema: type = Config, prefix: str = "") -> Iterator[Setting]:
    """The settings of a configuration's dataclass, sections in the order of its fields."""
    texts = _texts(schema)
    for item in dataclasses.fields(schema):
        name = item.name
        default = item.default_factory() if callable(item.default_factory) else item.default
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(default):
            yield from settings(type(default), f"{key}.")
            continue
        allowed = ", ".join(CHOICES[key]) if key in CHOICES else bounds(key)
        if key == "designer.name":
            allowed = ", ".join([*MASKS, *RESERVED]) + "; masks and a closed form as in unet+targets"
        yield Setting(key, str(item.type), _shown(default), texts.get(name, ""), allowed)


def help_text(asked: str | None = None) -> str:
    """All keys, or those that are `asked` or lie below it.

    Raises:
        UserError: there is no such key; the nearest are named.
    """
    plugins.load([])
    found = list(settings())
    if asked is not None:
        asked = asked.split("=")[0].strip(".").lower()
        chosen = [one for one in found if f"{one.key}.".startswith(f"{asked}.")]
        if not chosen:
            near = difflib.get_close_matches(asked, [one.key for one in found], n=3, cutoff=0.0)
            raise UserError(f"help {asked}: no such key; nearest: {', '.join(near)}")
        found = chosen
    return "\n".join(_entry(one) for one in found)


def _entry(one: Setting) -> str:
    lines = [f"{one.key}={one.default}    ({one.type})"]
    lines += [f"    {one.text}"] if one.text else []
    lines += [f"    {one.allowed}"] if one.allowed else []
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default == MISSING:
        return "???"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, (tuple, list)):  # as it is written in key=value
        return f"[{','.join(_shown(part) for part in default)}]"
    return str(default)


@cache
def _texts(schema: type) -> dict[str, str]:
    """The comments of a dataclass's fields."""
    source = inspect.getsource(schema)
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    comments: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    for node in tree.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while line in alone:
            above.insert(0, comments[line])
            line -= 1
        within = [comments[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
        text = " ".join([*above, *within])
        if text:
            found[node.target.id] = text
    return found


def page() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every key of `dino-value train`, in the order of `dino_value/config.py`; its comments are the text. Made by",
        "`python -m dino_value.settings > docs/settings.md`. `dino-value help KEY` says the same.",
    ]
    section = ""
    for one in settings():
        head = one.key.split(".")[0] if "." in one.key else "the run"
        if head != section:
            section = head
            lines += ["", f"## {section}", "", "| key | default | |", "|---|---|---|"]
        said = one.text + (f" [{one.allowed}]" if one.allowed else "")
        lines.append(f"| `{one.key}` | `{one.default}` | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
