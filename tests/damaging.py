"""Run folders whose files were spoiled, in many ways, and what the commands that read them make of it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "text",
        "ü\n",
        [],
        {},
        [1],
        {"a": 1},
        [[1]],
        "99",
    ),
)
BYTES = (
    *(b"", b"\n", b"\0" * 64, b"\xff\xfe\x00", b"null", b"[]", b"{}", b'"x"', b"5", b"{", b"[" * 20_000, b"a: b: c"),
    *(
        b"!!python/object/apply:os.abort []",
        b"PK\x03\x04",
        b"\x80\x04}\x94.",
        b"&a [*a]",
        b"<<: 1",
        b"1\r\n2",
        b"\t- x",
    ),
)
Damage = tuple[str, str]
"""A file, and what was done to it."""


def damaged(folder: Path, rng: random.Random) -> Damage:
    """Spoil one file of a run folder."""
    path = rng.choice(sorted(each for each in folder.rglob("*") if each.is_file() and each.suffix != ".png"))
    kinds: dict[str, Callable[[Path, random.Random], str]] = {
        "cut": _cut,
        "flipped": _flipped,
        "replaced": _replaced,
        "gone": _gone,
        "a folder": _a_folder,
        "a pipe": _a_pipe,
        "a link": _a_link,
        "rewritten": _rewritten,
        "swapped": _swapped,
        "edited": _edited,
        "edited again": _edited,
        "edited once more": _edited,
    }
    kind = rng.choice(list(kinds))
    return str(path.relative_to(folder)), f"{kind} {kinds[kind](path, rng)}"


def _cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    path.write_bytes(content[:at])
    return f"at {at}"


def _flipped(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    places = [rng.randrange(len(content)) for _ in range(rng.choice((1, 3, 30)))] if content else []
    for at in places:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"at {places}"


def _replaced(path: Path, rng: random.Random) -> str:
    content = rng.choice(BYTES)
    path.write_bytes(content)
    return repr(content[:40])


def _gone(path: Path, _: random.Random) -> str:
    path.unlink()
    return ""


def _a_folder(path: Path, _: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return ""


def _a_pipe(path: Path, _: random.Random) -> str:
    """Whoever reads it waits for ever."""
    path.unlink()
    os.mkfifo(path)
    return ""


def _a_link(path: Path, rng: random.Random) -> str:
    """To nothing, or to itself."""
    path.unlink()
    target = rng.choice(("nothing", path.name))
    path.symlink_to(target)
    return f"to {target}"


def _rewritten(path: Path, rng: random.Random) -> str:
    """As editors and other systems do: the same text in other bytes."""
    content = path.read_bytes()
    ways = {
        "with CRLF": content.replace(b"\n", b"\r\n"),
        "with a BOM": b"\xef\xbb\xbf" + content,
        "as UTF-16": content.decode("latin-1").encode("utf-16"),
        "with a line more": content + b"\n",
        "twice": content + content,
        "in another order": b"".join(reversed(content.splitlines(keepends=True))),
    }
    way = rng.choice(list(ways))
    path.write_bytes(ways[way])
    return way


def _swapped(path: Path, rng: random.Random) -> str:
    other = rng.choice(sorted(each for each in path.parent.iterdir() if each.is_file()))
    if other != path:
        shutil.copyfile(other, path)
    return f"for {other.name}"


def _edited(path: Path, rng: random.Random) -> str:
    """A value in the middle of a file that is else what it was."""
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        said = _one_value(content, rng)
        torch.save(content, path)
    elif path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        said = _one_value(lines, rng)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif path.suffix == ".json":
        content = json.loads(path.read_text())
        said = _one_value(content, rng)
        path.write_text(json.dumps(content))
    elif path.suffix == ".yaml":
        content = yaml.safe_load(path.read_text())
        said = _one_value(content, rng)
        path.write_text(yaml.safe_dump(content))
    else:
        return _replaced(path, rng)
    return said


def _one_value(content: Any, rng: random.Random) -> str:
    """Change, or take out, one value at a random depth."""
    path = ""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return f"{path} was empty"
        key = rng.choice(keys)
        path = f"{path}.{key}"
        inner = content[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
            content = inner
            continue
        if rng.random() < 0.2:
            del content[key]
            return f"{path} is gone"
        content[key] = rng.choice((*VALUES, torch.zeros(3)) if isinstance(inner, torch.Tensor) else VALUES)
        return f"{path} = {content[key]!r}"
