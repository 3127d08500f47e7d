"""Flower's deployment engine on loopback, by the commands of docs/deployment.md: TLS, nodes that must be let in."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```\n(.*?)^```",
    (ROOT / "docs/deployment.md").read_text().partition("## Real machines")[2],
    re.DOTALL | re.MULTILINE,
)
EXPORTS, CERTIFICATES, SUPERLINK, CONFIG, REGISTER, SUPERNODE, RUN = BLOCKS
OVERRIDES = [word for word in tiny.TINY if not word.startswith(("clients", "rounds"))]
PATIENCE = 1500
"""Seconds: on a busy machine each of the many processes takes a minute to import PyTorch."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


class Federation:
    """The page's commands in a folder of their own, on ports of their own; long-running ones end with the test."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack, self._port = folder, stack, free_port()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {"PATH": path, "FLWR_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}

    def _said(self, block: str) -> str:
        return f"set -e\n{EXPORTS}\n{block.replace('localhost:8000', f'localhost:{self._port}')}".replace(
            "--port 8000", f"--port {self._port}"
        )

    def does(self, block: str) -> str:
        """Run a block to its end."""
        done = subprocess.run(
            ["bash", "-c", self._said(block)],
            cwd=self._folder,
            env=self._environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def starts(self, block: str, name: str) -> subprocess.Popen[bytes]:
        """Run a block that goes on, with all that it starts in one process group; its output goes into a file."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", self._said(block)],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._stack.callback(end, process)
        return process

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.5)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def federation(folder: Path) -> Iterator[Federation]:
    with ExitStack() as stack:
        yield Federation(folder, stack)


def test_the_page_has_the_commands_in_this_order() -> None:
    """So that the test below runs what it thinks it runs."""
    first = [block.split()[0] for block in BLOCKS]
    assert first == ["export", "mkdir", "flower-superlink", "mkdir", "for", "flower-supernode", "flwr"]
    done = subprocess.run(["bash", "-n", "-c", "\n".join(BLOCKS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_federation_of_three_machines_loses_one_and_lets_no_stranger_in(tmp_path: Path) -> None:
    """Three SuperNodes and a stranger on loopback; one of the three is killed after the first of three rounds."""
    if shutil.which("openssl") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs openssl and ssh-keygen")
    run = tmp_path / "runs/real"

    def rounds() -> list[dict[str, object]]:
        return tiny.events(run, "round") if (run / "metrics.jsonl").exists() else []

    with federation(tmp_path) as nodes:
        nodes.does(CERTIFICATES)
        nodes.starts(SUPERLINK, "superlink")
        nodes.until(lambda: "Uvicorn running on https" in nodes.log("superlink"), "the SuperLink does not start")
        nodes.does(CONFIG)
        assert nodes.does(REGISTER).count("registered successfully") == 3
        started = {
            i: nodes.starts(SUPERNODE.replace("node0", f"node{i}").replace("9100", str(free_port())), f"node{i}")
            for i in range(3)
        }
        nodes.does('ssh-keygen -q -t ecdsa -b 384 -N "" -f keys/stranger')
        stranger = nodes.starts(SUPERNODE.replace("node0", "stranger").replace("9100", str(free_port())), "stranger")
        nodes.until(lambda: nodes.log("superlink").count("Activated node_id") == 3, "not all nodes are there")
        assert stranger.wait(PATIENCE) != 0
        assert "Failed to activate SuperNode" in nodes.log("stranger")
        command = RUN.replace("flwr run . ", f"flwr run {ROOT} ").replace(
            "rounds=10", f"rounds=3 {' '.join(OVERRIDES)}"
        )
        nodes.starts(command, "run")
        nodes.until(lambda: len(rounds()) == 1, "no round is finished")
        end(started[0])
        nodes.until((run / "done").exists, "the run does not end")
    summary = json.loads((run / "summary.json").read_text())
    assert [event["clients"] for event in rounds()] == [3, 2, 2]
    assert [event.get("refused_for") for event in rounds()] == [None, {"no_reply": 1}, {"no_reply": 1}]
    assert (summary["rounds"], summary["refused"], summary["skipped"]) == (3, 2, 0)
