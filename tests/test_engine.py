"""The engine: arrays by reference that read as Flower's own, and a Grid that keeps Flower's promises in one process."""

from __future__ import annotations

import importlib.metadata
import logging
import pickle
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run

from fl_sim.engines.flower import SERVER_NODE, empty_run, identify, set_message_id
from fl_sim.engines.inprocess import FIRST_NODE, RUN_ID, InProcessGrid, load_app
from fl_sim.engines.numerics import numerics
from fl_sim.engines.records import TensorArray, by_reference, pack, to_tensor, unpack

CPU = torch.device("cpu")

# Arrays ---------------------------------------------------------------------------------------------------------------

TENSORS = {
    "vector": torch.linspace(-3, 3, 1001),
    "matrix": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0),
    "double": torch.rand(3, dtype=torch.float64),
    "long": torch.arange(-2, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "special": torch.tensor([float("nan"), float("inf"), -0.0]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_array_is_indistinguishable_from_flowers_own(name: str) -> None:
    """Same object id, same deflated bytes, same fields: nothing changes for Ray, deployment or a checkpoint."""
    tensor = TENSORS[name]
    ours, theirs = TensorArray(tensor), Array(tensor.numpy())
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ours.deflate() == theirs.deflate()
    assert ours.object_id == theirs.object_id
    assert ours.data == theirs.data
    assert np.array_equal(ours.numpy(), theirs.numpy(), equal_nan=tensor.is_floating_point())
    assert by_reference({"x": ours}).object_id == ArrayRecord({"x": theirs}).object_id


def test_different_tensors_have_different_ids() -> None:
    """The control of the test above: ids follow the contents."""
    assert TensorArray(torch.zeros(3)).object_id != TensorArray(torch.ones(3)).object_id


def test_a_tensor_array_pickles_as_a_plain_array() -> None:
    """Another process must not need this project to read it, and gets the numbers, not a reference."""
    tensor = torch.rand(5)
    back = pickle.loads(pickle.dumps(TensorArray(tensor)))
    assert type(back) is Array
    assert back == Array(tensor.numpy())
    record = pickle.loads(pickle.dumps(RecordDict({"model": by_reference({"x": TensorArray(tensor)})})))
    assert torch.equal(to_tensor(record.array_records["model"]["x"], CPU), tensor)


def test_in_one_process_nothing_is_copied_or_serialised() -> None:
    """The point of it: the receiver gets the sender's memory, and no bytes are made along the way."""
    tensor = torch.rand(1000)
    array = TensorArray(tensor)
    record = RecordDict({"model": by_reference({"x": array})})
    received = to_tensor(record.array_records["model"]["x"], CPU)
    assert received.data_ptr() == tensor.data_ptr()
    assert "data" not in array.__dict__
    assert len(array.data) > 4000  # and when they are asked for, there they are
    assert "data" in array.__dict__


def test_a_plain_array_gives_a_fresh_writable_tensor() -> None:
    """What comes from another process may be written to without touching the message's bytes."""
    array = Array(np.arange(4, dtype=np.float32))
    tensor = to_tensor(array, CPU)
    tensor += 1
    assert to_tensor(array, CPU).tolist() == [0, 1, 2, 3]
    assert tensor.tolist() == [1, 2, 3, 4]


def test_a_gradient_does_not_hinder_reading() -> None:
    """A parameter that still asks for gradients serialises like its values."""
    parameter = torch.nn.Parameter(torch.arange(3.0))
    assert TensorArray(parameter).data == Array(torch.arange(3.0).numpy()).data


def test_a_state_survives_packing() -> None:
    """Tensors by reference, plain values by value and type; and nothing for a client that has remembered nothing."""
    state = {"momentum": torch.rand(3), "count": 4, "rate": 0.5, "name": "x", "done": True}
    back = unpack(pack(state), CPU)
    assert back.keys() == state.keys()
    assert torch.equal(back["momentum"], state["momentum"])  # type: ignore[arg-type]
    plain = ("count", "rate", "name", "done")
    assert [(back[key], type(back[key])) for key in plain] == [(state[key], type(state[key])) for key in plain]
    assert unpack(RecordDict(), CPU) == {}
    assert unpack(pack({}), CPU) == {}
    assert unpack(pickle.loads(pickle.dumps(pack(state))), CPU).keys() == state.keys()


# The Grid -------------------------------------------------------------------------------------------------------------

Handler = Callable[[Message, Context], Message]
Make = Callable[..., InProcessGrid]


@pytest.fixture
def make_grid() -> Iterator[Make]:
    """Grids around one function as the ClientApp; their threads end with the test."""
    grids: list[InProcessGrid] = []

    def make(handler: Handler, nodes: int = 3, workers: int = 1) -> InProcessGrid:
        app = ClientApp()
        app.train()(handler)
        grids.append(InProcessGrid(app, nodes, {"config": "text"}, workers))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


def asked(grid: InProcessGrid, *numbers: int, nodes: list[int] | None = None) -> list[Message]:
    """One train message for each number, to the nodes in order."""
    known = list(grid.get_node_ids()) if nodes is None else nodes
    return [
        Message(RecordDict({"ask": ConfigRecord({"number": number})}), dst_node_id=node, message_type="train")
        for number, node in zip(numbers, known, strict=False)
    ]


def number(message: Message) -> int:
    return int(message.content.config_records["ask"]["number"])  # type: ignore[arg-type]


def answer(message: Message, value: int) -> Message:
    return Message(RecordDict({"answer": MetricRecord({"value": value})}), reply_to=message)


def counting(message: Message, context: Context) -> Message:
    """Replies with how often this client has succeeded; fails on a negative number, after having counted."""
    seen = int(context.state.config_records["seen"]["times"]) if "seen" in context.state else 0  # type: ignore[arg-type]
    context.state["seen"] = ConfigRecord({"times": seen + 1})
    if number(message) < 0:
        raise ValueError("negative")
    return answer(message, seen + 1)


def counting_in_place(message: Message, context: Context) -> Message:
    """The same in the other way that Flower's examples write: editing the record that is there."""
    if "seen" not in context.state:
        context.state["seen"] = ConfigRecord({"times": 0, "all": []})
    record = context.state.config_records["seen"]
    record["times"] = int(record["times"]) + 1  # type: ignore[arg-type]
    record["all"].append(number(message))  # type: ignore[union-attr,arg-type]
    if number(message) < 0:
        raise ValueError("negative")
    return answer(message, int(record["times"]))


def values(replies: list[Message]) -> list[int]:
    return [int(reply.content.metric_records["answer"]["value"]) for reply in replies]  # type: ignore[arg-type]


def test_node_ids_are_the_same_in_every_run(make_grid: Make) -> None:
    """The i-th node serves client i for the whole run and in every run; the server's own node is none of them."""
    nodes = list(make_grid(counting, nodes=4).get_node_ids())
    assert nodes == list(make_grid(counting, nodes=4).get_node_ids()) == [2, 3, 4, 5]
    assert SERVER_NODE not in nodes
    assert nodes[0] == FIRST_NODE


@pytest.mark.parametrize("workers", [1, 3])
def test_replies_come_in_the_messages_order(make_grid: Make, workers: int) -> None:
    """Even if a later client is done earlier, and each reply says whom it comes from and what it answers."""

    def slow_first(message: Message, context: Context) -> Message:
        torch.rand(10 ** (6 if number(message) == 0 else 1)).sort()
        return answer(message, number(message))

    grid = make_grid(slow_first, nodes=6, workers=workers)
    messages = asked(grid, 0, 1, 2, 3, nodes=[7, 3, 5, 2])
    replies = grid.send_and_receive(messages)
    assert values(replies) == [0, 1, 2, 3]
    assert [reply.metadata.src_node_id for reply in replies] == [7, 3, 5, 2]
    ids = [message.metadata.message_id for message in messages]
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert len(set(ids) | {reply.metadata.message_id for reply in replies}) == 8


def test_pushing_and_pulling_is_sending_and_receiving(make_grid: Make) -> None:
    """Flower's two-step way gives the same replies, each once, by the pushed messages' ids."""
    grid = make_grid(lambda message, context: answer(message, number(message)))
    pushed = list(grid.push_messages(asked(grid, 10, 11, 12)))
    assert len(set(pushed)) == 3
    assert values(list(grid.pull_messages(pushed[1:]))) == [11, 12]
    assert values(list(grid.pull_messages(pushed))) == [10]
    assert list(grid.pull_messages(pushed)) == []


def test_messages_made_by_the_grid_are_delivered(make_grid: Make) -> None:
    """`create_message` is how older Flower code makes them."""
    grid = make_grid(counting)
    message = grid.create_message(RecordDict({"ask": ConfigRecord({"number": 1})}), "train", FIRST_NODE, "7")
    assert message.metadata.group_id == "7"
    assert values(grid.send_and_receive([message])) == [1]


@pytest.mark.parametrize("handler", [counting, counting_in_place])
def test_a_failing_client_replies_with_an_error_and_forgets_the_attempt(make_grid: Make, handler: Handler) -> None:
    """State counts successes only: it is committed on success, whether it is replaced or edited in place."""
    grid = make_grid(handler)
    assert values(grid.send_and_receive(asked(grid, 1, 1, 1))) == [1, 1, 1]
    replies = grid.send_and_receive(asked(grid, 1, -1, 1))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    reason = replies[1].error.reason or ""
    assert reason.splitlines()[0] == "ValueError: negative"
    assert "Traceback" in reason
    assert replies[1].metadata.src_node_id == FIRST_NODE + 1
    assert values(grid.send_and_receive(asked(grid, 1, 1, 1))) == [3, 2, 3]


def test_a_client_that_fails_at_first_has_no_state(make_grid: Make) -> None:
    """There is nothing to restore to but nothing."""
    grid = make_grid(counting)
    assert grid.send_and_receive(asked(grid, -1))[0].has_error()
    assert grid.private_states() == {}
    assert values(grid.send_and_receive(asked(grid, 1))) == [1]


def remembering(message: Message, context: Context) -> Message:
    """Keeps a tensor and a count as our own ClientApp does, unless the number is 0: then it leaves its state alone."""
    state = dict(unpack(context.state, CPU))
    if number(message):
        count = int(state.get("count", 0)) + number(message)  # type: ignore[arg-type]
        context.state = pack({"count": count, "last": torch.full((2,), float(number(message)))})
        return answer(message, count)
    return answer(message, int(state.get("count", 0)))  # type: ignore[arg-type]


def test_only_changed_states_are_handed_out_for_the_checkpoint(make_grid: Make) -> None:
    """A state is rewritten only when it has changed, and by client, not by node."""
    grid = make_grid(remembering)
    grid.send_and_receive(asked(grid, 5, 0, 7))
    states = grid.private_states()
    assert {client: state["count"] for client, state in states.items()} == {0: 5, 2: 7}
    assert states[2]["last"].tolist() == [7.0, 7.0]  # type: ignore[union-attr]
    assert grid.private_states() == {}
    grid.send_and_receive(asked(grid, 0, 0, 1))
    assert {client: state["count"] for client, state in grid.private_states().items()} == {2: 8}


def test_an_edit_in_place_is_a_change_and_reading_is_none(make_grid: Make) -> None:
    """A record edited in place must reach the checkpoint, or a resumed run would have lost it."""
    grid = make_grid(counting_in_place)
    grid.send_and_receive(asked(grid, 1))
    assert list(grid.private_states()) == [0]
    grid.send_and_receive(asked(grid, 2))
    assert list(grid.private_states()) == [0]

    def reading(message: Message, context: Context) -> Message:
        return answer(message, int(context.state.config_records["seen"]["times"]))  # type: ignore[arg-type]

    grid._app = ClientApp()
    grid._app.train()(reading)
    assert values(grid.send_and_receive(asked(grid, 0))) == [2]
    assert grid.private_states() == {}


def test_restored_states_are_what_clients_find(make_grid: Make) -> None:
    """What one Grid handed out makes another one's clients go on from there."""
    first = make_grid(remembering)
    first.send_and_receive(asked(first, 5, 0, 7))
    second = make_grid(remembering)
    second.restore(first.private_states())
    assert values(second.send_and_receive(asked(second, 1, 1, 1))) == [6, 1, 8]


def test_the_context_tells_a_client_its_node_and_the_runs_config(make_grid: Make) -> None:
    """As under Flower; and editing one client's run config does not change another's."""
    seen: list[tuple[int, int, object]] = []

    def telling(message: Message, context: Context) -> Message:
        seen.append((context.run_id, context.node_id, context.run_config["config"]))
        context.run_config["config"] = "spoilt"
        return answer(message, 0)

    grid = make_grid(telling)
    grid.send_and_receive(asked(grid, 0, 0))
    assert seen == [(RUN_ID, FIRST_NODE, "text"), (RUN_ID, FIRST_NODE + 1, "text")]


def test_clients_run_on_one_torch_thread_each(make_grid: Make) -> None:
    """The same number of threads whatever `workers` is: float sums, and so results, do not depend on it."""
    grid = make_grid(lambda message, context: answer(message, torch.get_num_threads()), nodes=6, workers=3)
    torch.set_num_threads(2)
    try:
        assert values(grid.send_and_receive(asked(grid, *range(6)))) == [1] * 6
    finally:
        torch.set_num_threads(1)


def test_flowers_own_fedavg_runs_over_it_unchanged(make_grid: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Its strategies know nothing of this Grid.

    Each client adds its node id to the global zeros, so after round t the average is t · mean(2, 3, 4) = 3t; the
    evaluation reports that value back.
    """
    caplog.set_level(logging.CRITICAL, logger="flwr")

    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        added = ArrayRecord({name: Array(array.numpy() + context.node_id) for name, array in arrays.items()})
        metrics = MetricRecord({"num-examples": 1, "node": context.node_id})
        return Message(RecordDict({"arrays": added, "metrics": metrics}), reply_to=message)

    def evaluate(message: Message, context: Context) -> Message:
        value = float(message.content.array_records["arrays"]["w"].numpy()[0])
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "w": value})}), reply_to=message)

    grid = make_grid(train)
    grid._app.evaluate()(evaluate)
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=3)
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(2, dtype=np.float32))}), num_rounds=2)
    assert result.arrays["w"].numpy().tolist() == [6.0, 6.0]
    assert result.train_metrics_clientapp[2]["node"] == pytest.approx(3)
    assert [result.evaluate_metrics_clientapp[t]["w"] for t in (1, 2)] == pytest.approx([3.0, 6.0])


def test_a_run_serialises_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the model on its way out nor the updates on their way back become bytes in one process."""
    read: list[str] = []
    original = TensorArray.__getattribute__

    def spying(self: TensorArray, name: str) -> object:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(TensorArray, "__getattribute__", spying)
    tiny.run(tmp_path / "run", "rounds=2")
    # 2 rounds of 4 clients: each reads the model, its update is read; in round 2 two attackers read round 1's model.
    assert read.count("tensor") == 18
    assert "data" not in read


@pytest.mark.parametrize("attack", ["model_replacement", "none"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, attack: str) -> None:
    """Bit for bit: all metrics but the seconds, and the final model's bytes."""
    overrides = (*tiny.ERASING, f"attack={attack}", "rounds=4", "aggregator=multi_krum")
    one = tiny.run(tmp_path / "one", *overrides, "engine.workers=1")
    three = tiny.run(tmp_path / "three", *overrides, "engine.workers=3")
    assert tiny.numbers(one) == tiny.numbers(three)
    assert len(tiny.numbers(one)) == 6
    left, right = (torch.load(folder / "model.pt", weights_only=True) for folder in (one, three))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_servers_threads_are_set_for_the_run_only(tmp_path: Path) -> None:
    """`engine.server_threads` must not leak into whatever the process does next."""
    seen: list[int] = []
    from fl_sim.rounds import Federation

    original = Federation._aggregate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_aggregate", lambda *a: [seen.append(torch.get_num_threads()), original(*a)][1])
        tiny.run(tmp_path / "run", "engine.server_threads=2", "rounds=1")
    assert seen == [2]
    assert torch.get_num_threads() == 1


# What Flower keeps private --------------------------------------------------------------------------------------------


def test_flower_is_the_minor_release_that_the_private_parts_were_tested_with() -> None:
    """The pin in pyproject.toml and the installed version agree; a new minor release must be tried, not slipped in."""
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    [pin] = [each for each in pyproject["project"]["dependencies"] if each.startswith("flwr")]
    major, minor = importlib.metadata.version("flwr").split(".")[:2]
    assert pin == f"flwr>={major}.{minor},<{major}.{int(minor) + 1}"


def test_the_compatibility_module_does_what_it_says() -> None:
    """Identity for making messages, a run that is only a number, and a message's id that replies copy."""
    identify(5)
    message = Message(RecordDict(), dst_node_id=9, message_type="train")
    assert (message.metadata.run_id, message.metadata.src_node_id) == (5, SERVER_NODE)
    assert message.metadata.message_id != "17"
    set_message_id(message, "17")
    assert message.metadata.message_id == "17"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "17"
    run = empty_run(5)
    assert isinstance(run, Run)
    assert run.run_id == 5


def test_an_app_is_found_by_flowers_kind_of_reference() -> None:
    """`module:name`, as in pyproject.toml's [tool.flwr.app.components], which names the same two apps."""
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    components = pyproject["tool"]["flwr"]["app"]["components"]
    assert isinstance(load_app(components["clientapp"]), ClientApp)
    assert type(load_app(components["serverapp"])).__name__ == "ServerApp"


def test_a_gpus_switches_are_set_for_a_run_and_put_back() -> None:
    """float32 means float32, and the same bits each time; TF32 and faster algorithms only where they were asked for."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def switches() -> tuple[object, ...]:
        return cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision

    before = switches()
    with numerics("float32", deterministic=True):
        assert switches() == (True, False, "ieee", "ieee")
    assert switches() == before
    with numerics("tf32", deterministic=False):
        assert switches() == (False, True, "tf32", "tf32")
    assert switches() == before
