"""Ray: clients that remember on workers that don't, and the same numbers from Flower's own simulation engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray_apps
import tiny
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_sim import execution
from fl_sim.cli import main
from fl_sim.composing import compose_config
from fl_sim.engines.carried import DEATH, DIED, PREFIX, CarryingGrid, call_with_state, put_state, take_state
from fl_sim.engines.flower import STARTING, Workers
from fl_sim.engines.inprocess import InProcessGrid, failed
from fl_sim.engines.ray import FOLDER, Ray
from fl_sim.engines.records import pack, unpack
from fl_sim.errors import ConfigError, RunError
from fl_sim.rounds import Federation

CPU = torch.device("cpu")

# What needs no Ray --------------------------------------------------------------------------------------------------


def test_a_state_travels_in_a_message_and_comes_out_whole() -> None:
    """What else the message says stays as it was."""
    content = pack({"answer": 42})
    put_state(content, pack({"momentum": torch.arange(3.0), "count": 2}))
    assert {name for name in content if name.startswith(PREFIX)} == {f"{PREFIX}tensors", f"{PREFIX}plain"}
    state = unpack(take_state(content), CPU)
    assert torch.equal(state["momentum"], torch.arange(3.0))  # type: ignore[arg-type]
    assert state["count"] == 2
    assert unpack(content, CPU) == {"answer": 42}
    assert take_state(content) == RecordDict()


@pytest.fixture
def forgetful() -> Iterator[tuple[CarryingGrid, list[list[str]]]]:
    """A carrying grid over one whose nodes start with no state each time; and which states each reply carried."""
    carried: list[list[str]] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        assert not context.state
        blank = Context(context.run_id, context.node_id, {}, RecordDict(), {})
        reply = call_with_state(ray_apps.remember, message, {"config": "text"}, blank)
        sent = reply.content if reply.has_content() else {}
        carried.append([name for name in sent if name.startswith(PREFIX)])
        return reply

    inner = InProcessGrid(app, 3, {}, workers=1)
    yield CarryingGrid(inner, lambda: None), carried
    inner.close()


def test_a_state_is_carried_only_if_it_has_changed_and_only_by_success(
    forgetful: tuple[CarryingGrid, list[list[str]]],
) -> None:
    """Three clients add up numbers: 5, 0 (no change), 7; then 1, a failure after the change, 1; then they tell."""
    grid, carried = forgetful
    assert ray_apps.sums(grid.send_and_receive(ray_apps.asked(grid, 5, 0, 7))) == [5, 0, 7]
    assert [len(names) for names in carried] == [2, 0, 2]
    assert {client: state["sum"] for client, state in grid.private_states().items()} == {0: 5, 2: 7}
    replies = grid.send_and_receive(ray_apps.asked(grid, 1, -1, 1))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert (replies[1].error.reason or "").splitlines()[0] == "ValueError: negative"
    assert {client: state["sum"] for client, state in grid.private_states().items()} == {0: 6, 2: 8}
    assert ray_apps.sums(grid.send_and_receive(ray_apps.asked(grid, 0, 0, 0))) == [6, 0, 8]
    assert grid.private_states() == {}


def test_restored_states_are_what_clients_find(forgetful: tuple[CarryingGrid, list[list[str]]]) -> None:
    """By client, so that the random node ids of another run don't matter."""
    grid, _ = forgetful
    grid.restore({1: {"sum": 10}})
    assert ray_apps.sums(grid.send_and_receive(ray_apps.asked(grid, 1, 1, 1))) == [1, 11, 1]


def test_replies_come_in_the_messages_order_and_late_ones_are_left_out(
    forgetful: tuple[CarryingGrid, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the grid below hands them out."""
    grid, _ = forgetful
    inner = grid._grid
    pull = inner.pull_messages
    monkeypatch.setattr(inner, "pull_messages", lambda names: list(pull(names))[::-1])
    assert ray_apps.sums(grid.send_and_receive(ray_apps.asked(grid, 1, 2, 3))) == [1, 2, 3]
    monkeypatch.setattr(inner, "pull_messages", lambda names: [])
    assert grid.send_and_receive(ray_apps.asked(grid, 1), timeout=0.05) == []


def test_after_a_timeout_clients_are_ended_and_orders_that_still_wait_lapse(
    forgetful: tuple[CarryingGrid, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next round would wait for them; an order that comes to a worker too late changes nothing."""
    grid, carried = forgetful
    ended: list[int] = []
    impatient = CarryingGrid(grid._grid, lambda: None, lambda: ended.append(1))
    assert ray_apps.sums(impatient.send_and_receive(ray_apps.asked(impatient, 1, 2, 3), timeout=60)) == [1, 2, 3]
    assert ended == []
    monkeypatch.setattr(impatient._grid, "pull_messages", lambda names: [])
    assert impatient.send_and_receive(ray_apps.asked(impatient, 1), timeout=0.01) == []
    assert ended == [1]
    monkeypatch.undo()
    assert [len(names) for names in carried[:3]] == [2, 2, 2]
    assert impatient.send_and_receive(ray_apps.asked(impatient, 1, 2, 3), timeout=-1) == []
    assert carried[-3:] == [[], [], []]
    kept = {client: state["sum"] for client, state in impatient.private_states().items()}
    assert kept == {0: 1, 1: 2, 2: 3}


def test_a_worker_that_never_answered_is_given_time_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended at its first missed timeout it would start again and again; one that has answered is ended at once."""
    killed: list[tuple[str, bool]] = []
    fake = SimpleNamespace(
        kill=lambda actor, no_restart: killed.append((actor, no_restart)), is_initialized=lambda: True
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    workers = Workers(pools=[SimpleNamespace(_future_to_actor={1: "started", 2: "starting"})])
    workers.note("started")
    workers.give_up()
    assert killed == [("started", False)]
    for _ in range(STARTING - 2):  # the first is one that starts now, too
        workers.give_up()
    assert killed == [("started", False)]
    workers.give_up()
    assert killed[1:] == [("starting", False)]
    workers.end()
    assert killed[2:] == [("started", True), ("starting", True)]


def test_a_fault_of_the_engine_ends_the_waiting(forgetful: tuple[CarryingGrid, list[list[str]]]) -> None:
    """Without it the server would wait for ever for replies that nobody works on."""
    grid, _ = forgetful

    def check() -> None:
        raise RunError("it has stopped")

    stopped = CarryingGrid(grid._grid, check)
    with pytest.raises(RunError, match="it has stopped"):
        stopped.send_and_receive(ray_apps.asked(stopped, 1))


def test_a_dead_worker_is_told_in_words(forgetful: tuple[CarryingGrid, list[list[str]]]) -> None:
    """Flower's reason is Ray's exception with its class; an ordinary failure's reason stays as it is."""
    grid, _ = forgetful
    [message] = ray_apps.asked(grid, 0)
    reply = failed(ValueError("x"), message)
    assert (grid._received(reply).error.reason or "").splitlines()[0] == "ValueError: x"
    reply.error.__dict__["_reason"] = f"{DIED}ActorDiedError'>:<'The actor died'>"
    assert (grid._received(reply).error.reason or "").splitlines()[0] == DEATH


def test_without_ray_one_line_says_what_to_install(
    cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 2, and no run folder."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a))
    assert main(["run", "engine=ray"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint == 'fl-sim: engine=ray: needs Ray, which is not installed: pip install "fl-sim[ray]"'
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["engine.workers=0"], "workers"),
        (["engine.cpus=0"], "cpus"),
        (["engine.gpus=1.5"], "gpus"),
        (["engine.gpus=-1"], "gpus"),
        (["engine.server_threads=0"], "server_threads"),
        (["engine.address=''"], "address"),
        (["engine.address=auto", "engine.workers=2"], "workers"),
    ],
)
def test_impossible_settings_are_refused_by_name(overrides: list[str], key: str) -> None:
    """Before Ray is even looked for."""
    with pytest.raises(ConfigError) as refused:
        execution.prepare(compose_config(["engine=ray", *overrides]))
    assert refused.value.key == f"engine.{key}"


def test_a_worker_gets_a_gpu_of_its_own_so_none_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every worker its GPU is number 0, whatever it is for the server."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    Ray().check_machine("cuda")
    with pytest.raises(ConfigError, match="device=cuda:1"):
        Ray().check_machine("cuda:1")


def test_folders_of_killed_runs_are_removed_and_no_others(tmp_path: Path) -> None:
    """A folder whose lock is free is one that nobody will remove any more, unless it has only just been made."""
    from fl_sim.engines import ray

    names = ("held", "left", "young")
    held, left, young = (tmp_path / f"{FOLDER}{name}" for name in names)
    for folder in (held, left, young, tmp_path / "other"):
        (folder / "session").mkdir(parents=True)
        if folder != young:
            os.utime(folder, (1.0, 1.0))
    lock = ray._locked(held)
    own, own_lock = ray._own_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {held.name, young.name, "other", Path(own).name}
    os.close(lock)
    assert own_lock is not None
    os.close(own_lock)
    again, again_lock = ray._own_folder(tmp_path)
    assert again_lock is not None
    os.close(again_lock)
    assert not held.exists()
    assert Path(again).exists()


# What needs it ------------------------------------------------------------------------------------------------------

HAS_RAY = importlib.util.find_spec("ray") is not None


def with_ray(test: Any) -> Any:
    """A test that starts Ray: slow, and left out where Ray is not installed."""
    reason = 'Ray is not installed: pip install -e ".[ray]"'
    marks = (pytest.mark.slow, pytest.mark.ray, pytest.mark.skipif(not HAS_RAY, reason=reason))
    # Ray's own warnings are not ours.
    for mark in (*marks, pytest.mark.filterwarnings("ignore")):
        test = mark(test)
    return test


REMEMBERING = (
    "client=fed_nad",
    "client.lr=0.01",
    "client.teacher_lr=0.05",
    "attack.boost=1",
    *tiny.ERASING,
    "rounds=4",
)
"""Clients that remember a teacher, attackers, and an eraser."""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes of one core each, on this machine's own network."""
    folder = tempfile.mkdtemp(prefix="fl-sim-test-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        from ray.cluster_utils import Cluster

        found = Cluster(shutdown_at_exit=False)
        try:
            for _ in range(2):
                # With ports said beforehand no node gives up, after 15 seconds, waiting for its agents to say theirs.
                agents = ("metrics_agent", "metrics_export", "runtime_env_agent", "dashboard_agent_listen")
                ports = {f"{name}_port": free_port() for name in agents}
                found.add_node(num_cpus=1, num_gpus=0, include_dashboard=False, **ports)
            yield found.address
        finally:
            found.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def on(address: str, app: str | None = None) -> tuple[str, ...]:
    """The overrides that run on a cluster, another ClientApp if one is named."""
    return ("engine=ray", f"engine.address='{address}'", *([f"+engine.client_app=ray_apps:{app}"] if app else []))


def same_models(left: Path, right: Path) -> bool:
    one, other = (torch.load(folder / "model.pt", weights_only=True) for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@with_ray
def test_ray_gives_the_numbers_of_inprocess_and_leaves_nothing_behind(
    tmp_path: Path, left_over: Callable[[], set[str]]
) -> None:
    """Bit for bit, with a Ray of the run's own: metrics, model, checkpoint, and what each client remembers."""
    here = tiny.run(tmp_path / "here", *REMEMBERING)
    there = tiny.run(tmp_path / "there", *REMEMBERING, "engine=ray", "engine.workers=2")
    assert tiny.numbers(here) == tiny.numbers(there)
    assert len(tiny.numbers(here)) == 6
    assert same_models(here, there)
    remembered = sorted(path.name for path in (here / "clients").iterdir())
    assert remembered == sorted(path.name for path in (there / "clients").iterdir())
    assert len(remembered) == 3  # the attackers remember nothing
    for name in remembered:
        one, other = (torch.load(folder / "clients" / name, weights_only=True) for folder in (here, there))
        assert torch.equal(one["teacher"], other["teacher"])
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    assert not left_over()


@with_ray
def test_a_cluster_of_two_nodes_gives_them_too_and_is_left_running(tmp_path: Path, cluster: str) -> None:
    """Interrupted after round 2 and resumed on it, what the clients remember included."""
    here = tiny.run(tmp_path / "here", *REMEMBERING)
    there = tmp_path / "there"
    original = Federation._save

    def save(self: Federation, t: int) -> None:
        original(self, t)
        if t == 2:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_save", save)
        with pytest.raises(Interrupted):
            tiny.run(there, *REMEMBERING, *on(cluster))
    assert [event["round"] for event in tiny.events(there, "round")] == [1, 2]
    execution.resume(there)
    assert tiny.numbers(here) == tiny.numbers(there)
    assert same_models(here, there)
    # Both nodes are still there, and nobody holds their cores any more.
    import ray

    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        assert [node["Resources"].get("CPU") for node in ray.nodes() if node["Alive"]] == [1, 1]
        wait_until(lambda: ray.available_resources().get("CPU") == 2)
    finally:
        ray.shutdown()


@with_ray
def test_clients_that_fail_are_told_as_in_one_process(tmp_path: Path, cluster: str) -> None:
    """The same lines, and the same numbers without them."""
    here = tiny.run(tmp_path / "here", "+engine.client_app=ray_apps:failing")
    there = tiny.run(tmp_path / "there", *on(cluster, "failing"))
    assert tiny.numbers(here) == tiny.numbers(there)
    failures = tiny.events(there, "client_failed")
    assert failures
    assert {event["reason"].partition(" does")[0] for event in failures} == {
        f"ValueError: client {event['client']}" for event in failures
    }


@with_ray
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    """It is started again, and what it was doing is done once more."""
    here = tiny.run(tmp_path / "here")
    mark = tmp_path / "mark"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FL_SIM_TEST_MARK", str(mark))  # a Ray that is started now hands it to its workers
        there = tiny.run(
            tmp_path / "there", "engine=ray", "engine.workers=2", "+engine.client_app=ray_apps:killed_once"
        )
    assert mark.exists()
    assert tiny.numbers(here) == tiny.numbers(there)


@with_ray
def test_clients_that_kill_every_worker_end_the_run_with_a_line(tmp_path: Path, cluster: str) -> None:
    """What was finished before stays."""
    with pytest.raises(RunError, match="round 2: every client failed; the first one with WorkerDied: a worker process"):
        tiny.run(tmp_path / "run", *on(cluster, "deadly"))
    assert [event["round"] for event in tiny.events(tmp_path / "run", "round")] == [1]
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@with_ray
def test_a_cluster_without_room_or_without_existence_is_said_in_a_line(tmp_path: Path, cluster: str) -> None:
    """What is missing, or where nothing answers."""
    with pytest.raises(
        RunError, match=r"no room for a worker: .* 2 cores and 0 GPUs, a node of the cluster has 1 and 0"
    ):
        tiny.run(tmp_path / "cores", *on(cluster), "engine.cpus=2")
    with pytest.raises(RunError, match=r"no room for a worker: .* 1 cores and 0.5 GPUs"):
        tiny.run(tmp_path / "gpus", *on(cluster), "engine.gpus=0.5")
    with pytest.raises(RunError, match=r"can't reach Ray at engine.address=127.0.0.1:1: "):
        tiny.run(tmp_path / "nowhere", *on("127.0.0.1:1"))


@with_ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything_and_the_run_goes_on_later(
    tmp_path: Path, number: signal.Signals, left_over: Callable[[], set[str]]
) -> None:
    """To the whole group of processes, as Ctrl-C in a terminal: exit status 130, no Ray left, and it can be resumed."""
    # Long enough that the interrupt comes in the midst of it.
    command = ["-m", "fl_sim.cli", "run", *tiny.TINY, "rounds=500", "engine=ray", f"output={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: bool(list(tmp_path.glob("*/*/checkpoint.pt"))), seconds=600)
        assert left_over()
        os.killpg(process.pid, number)
        _, complaint = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    [folder] = [path.parent for path in tmp_path.glob("*/*/checkpoint.pt")]
    assert f"Go on with: fl-sim resume {folder}" in complaint
    assert "Traceback" not in complaint
    wait_until(lambda: not left_over())
    done = tiny.events(folder, "round")
    assert 1 <= len(done) < 500
    assert tiny.numbers(folder) == tiny.numbers(tiny.run(tmp_path / "whole", f"rounds={len(done)}"))


MARK = "FL_SIM_RAY_TEST"


@pytest.fixture
def left_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], set[str]]]:
    """What is left of the Rays that this test has started: processes, by an environment they inherit, and folders.

    Another test, or another user of the machine, may run a Ray at the same time.
    """
    monkeypatch.setenv(MARK, str(tmp_path))
    folders = tempfile.mkdtemp(prefix="ray-")  # sockets' names must be short
    monkeypatch.setattr(tempfile, "tempdir", folders)
    monkeypatch.setenv("TMPDIR", folders)

    def left() -> set[str]:
        found = {path.name for path in Path(folders).glob(f"{FOLDER}*")}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                inherited = (folder / "environ").read_bytes().split(b"\0")
                words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:  # it has ended meanwhile, or is somebody else's
                continue
            if f"{MARK}={tmp_path}".encode() in inherited and int(folder.name) != os.getpid():
                found.add(words)
        return found

    yield left
    shutil.rmtree(folders, ignore_errors=True)


def wait_until(holds: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.1)


class Interrupted(Exception):
    """As if the process had been killed here."""
