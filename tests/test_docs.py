"""The commands that the pages show: a shell takes them, and what they ask for can be run."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_sim.build import build
from fl_sim.composing import compose_config, jobs
from fl_sim.sweep_plan import plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOREIGN = ("--config-dir", "--cfg", "hydra/sweeper", "HARD", "HOME", "...")
"""What marks a command that is about files of the reader's own, or no single command."""


def commands() -> Iterator[tuple[str, str]]:
    """Every command of fl-sim's in a block of code, with its page; the transcripts of errors (`$ fl-sim`) aside."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if line.strip().startswith("fl-sim "):
                    yield page.name, line.strip()


def test_a_shell_takes_every_command() -> None:
    """A bracket that is not quoted is the shell's own, and its error says nothing of fl-sim."""
    found = list(commands())
    assert len(found) > 50
    lines = "\n".join(line for _, line in found)
    done = subprocess.run(["bash", "-n", "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "line"), [each for each in commands() if not any(mark in each[1] for mark in FOREIGN)]
)
def test_a_command_can_be_run(page: str, line: str) -> None:
    """Its first and its last run compose and build."""
    words = shlex.split(line, comments=True)
    if words[1] not in ("run", "central"):
        return
    overrides = [word for word in words[2:] if "=" in word and not word.startswith("-")]
    found = jobs(plan(overrides).overrides) if "-m" in words else [overrides]
    for job in (found[0], found[-1]):
        build(compose_config(list(job)))
