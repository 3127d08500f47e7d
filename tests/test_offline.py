"""Nothing is asked of a network, at import or at run time, unless a user asks for it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from fl_sim.cli import OK, main

GUARDED = """
import socket, sys

def outside(*asked):
    print("NETWORK", *asked, file=sys.stderr)
    raise OSError("this process has no network")

def guarded(inner):
    def connect(self, address, *rest):
        near = self.family == socket.AF_UNIX or str(address[0]).startswith(("127.", "::1", "localhost"))
        return inner(self, address, *rest) if near else outside(address)
    return connect

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = outside
from fl_sim.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""A process whose sockets reach nothing but itself, from before the first import on."""


COMMANDS = {
    "run": ["run", *tiny.TINY, *tiny.ERASING, "rounds=2"],
    "central": ["central", *tiny.TINY, *tiny.ERASING, "central.epochs=1"],
    "list": ["list", "eraser"],
    "report": ["report", "runs", "-o", "report.html"],
    "compare": ["compare", "RUN", "RUN"],
    "resume": ["resume", "RUN"],
    "replay": ["replay", "RUN"],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for the commands that read one."""
    return tiny.run(tmp_path_factory.mktemp("done") / "run", *tiny.ERASING, "rounds=2")


@pytest.mark.parametrize("words", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_asks_nothing_of_a_network(
    words: list[str], done: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way out of this process is closed, even to itself: nothing tries one."""
    shutil.copytree(done, cwd / "runs/run")
    asked: list[Any] = []

    def closed(*address: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, closed)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, closed)
    with pytest.raises(OSError, match="no network"), socket.socket() as control:  # the doors really are shut
        control.connect(("127.0.0.1", 9))
    del asked[:]
    assert main([word.replace("RUN", "runs/run") for word in words]) == OK
    assert asked == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["run", "rounds=2"], ["central", "central.epochs=1", "erasers=[nad]"], ["list"], ["gallery"]],
    ids=" ".join,
)
def test_a_command_from_its_first_import_on_asks_nothing_of_a_network(words: list[str], tmp_path: Path) -> None:
    """The default run, in a process of its own; the operating system is asked, too, where strace is installed."""
    trace = tmp_path / "trace"
    watched = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace)]
    command = [*(watched if shutil.which("strace") else []), sys.executable, "-c", GUARDED, *words]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLWR")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == OK, done.stderr
    assert "NETWORK" not in done.stderr
    if trace.exists():
        out = re.findall(r"^.*sa_family=AF_INET6?.*$", trace.read_text(), re.MULTILINE)
        assert [line for line in out if '"127.' not in line and '"::1"' not in line] == []
