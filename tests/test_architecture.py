"""The house rules, read off the source: who imports whom, what a method's file looks like, what a defense may know.

Each rule is a function from source text to complaints. Every one is first shown a piece of source that breaks it, so
that a rule that has stopped finding anything fails too.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fl_sim.protocols import ServerContext

ROOT = Path(__file__).parent.parent
ROOMS = ("clients", "server", "defenses")
HYDRA = ("fl_sim/composing.py", "fl_sim/sweep_plan.py")
FLOWER = ("clients/app.py", "server/app.py", "fl_sim/engines/", "defenses/aggregation/flower.py")
METHOD_FOLDERS = ("clients/", "server/", "defenses/")


def sources() -> dict[str, str]:
    """Every Python file of the four packages by its path in the repository."""
    found = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for room in ("fl_sim", *ROOMS)
        for path in sorted((ROOT / room).rglob("*.py"))
    }
    assert len(found) > 40, "the packages were not found"
    return found


def imported(source: str, path: str = "") -> Iterator[str]:
    """Full dotted names of everything that a file imports, wherever in the file it does so."""
    package = path.removesuffix("/__init__.py").removesuffix(".py").split("/")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + path.endswith("__init__.py")] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            yield from [str(node.args[0].value)] if called in ("import_module", "__import__") else []


def crossing_rooms(path: str, source: str) -> list[str]:
    """Rooms import only fl_sim and themselves; fl_sim imports no room: `_target_` is the only link."""
    own = path.split("/")[0]
    return [f"{path} imports {name}" for name in imported(source, path) if name.split(".")[0] in {*ROOMS} - {own}]


def hydra_elsewhere(path: str, source: str) -> list[str]:
    """Hydra is imported only where configurations are composed."""
    return [f"{path} imports {n}" for n in imported(source, path) if n.split(".")[0] == "hydra" and path not in HYDRA]


def flower_elsewhere(path: str, source: str) -> list[str]:
    """Flower is imported only by the two apps, the engines and the adapter of its strategies."""
    return [
        f"{path} imports {name}"
        for name in imported(source, path)
        if name.split(".")[0] in ("flwr", "ray") and not path.startswith(FLOWER)
    ]


def swallowed_errors(path: str, source: str) -> list[str]:
    """No bare `except`, and no handler that does nothing."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            idle = all(
                isinstance(each, ast.Pass) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
                for each in node.body
            )
            if node.type is None or idle:
                complaints.append(f"{path}:{node.lineno} hides errors")
    return complaints


def undocumented(path: str, source: str) -> list[str]:
    """A method's file begins with a docstring, and so does each class that a configuration can name."""
    if not path.startswith(METHOD_FOLDERS):
        return []
    tree = ast.parse(source)
    nodes: list[ast.Module | ast.ClassDef] = [tree, *(each for each in tree.body if isinstance(each, ast.ClassDef))]
    names = [getattr(node, "name", "the module") for node in nodes if not ast.get_docstring(node)]
    return [f"{path}: {name} has no docstring" for name in names if name != "GridExchange"]


def overlong(path: str, source: str) -> list[str]:
    """One paper is one file of about 150 lines at most."""
    lines = len(source.splitlines())
    return [f"{path} has {lines} lines"] if path.startswith(METHOD_FOLDERS) and lines > 165 else []


def vague_names(path: str, source: str) -> list[str]:
    """Names say what a thing is: no utils, helpers, base_*, *_v2, Manager, args."""
    stem = Path(path).stem
    complaints = [path] if re.fullmatch(r"utils?|helpers?|common|misc|base|base_.*|.*_v\d+", stem) else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and re.search(r"Manager$|^Base[A-Z]|V\d$", node.name):
            complaints.append(f"{path}: class {node.name}")
        if isinstance(node, ast.arg) and node.arg == "args":
            complaints.append(f"{path}: an argument called args")
    return complaints


def global_randomness(path: str, source: str) -> list[str]:
    """Randomness is an argument: nothing draws from, or seeds, a generator of the whole process."""
    pattern = (
        r"torch\.(manual_seed|seed)\(|\bnp\.random\.(?!default_rng|Generator)\w+\(|^\s*import random\b|\brandom\.seed"
    )
    return [f"{path}: {found.group()}" for found in re.finditer(pattern, source, re.MULTILINE)]


def rules_in_print(path: str, source: str) -> list[str]:
    """Only the command line and the progress display print: results have one writer, the trackers."""
    if path in ("fl_sim/cli.py", "fl_sim/console.py"):
        return []
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{path}:{node.lineno} prints" for node in calls if ast.unparse(node.func) == "print"]


def unpickling(path: str, source: str) -> list[str]:
    """What a file says is never executed: no pickles, torch.load for tensors only, YAML by safe loaders."""
    packages = ("pickle", "shelve", "marshal", "dill", "cloudpickle")
    complaints = [f"{path} imports {name}" for name in imported(source, path) if name.split(".")[0] in packages]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            careless = {
                "torch.load": given.get("weights_only") != "True",
                "yaml.load": given.get("Loader") != "LOADER",
                "np.load": given.get("allow_pickle", "False") != "False",
                "joblib.load": True,
                "eval": True,
                "exec": True,
            }
            complaints += [f"{path}:{node.lineno}: {ast.unparse(node)}"] if careless.get(called, False) else []
    return complaints


Rule = Callable[[str, str], list[str]]
BROKEN: list[tuple[Rule, str, str]] = [
    (crossing_rooms, "clients/sgd.py", "from defenses.erasing.nad import Nad"),
    (crossing_rooms, "defenses/erasing/nad.py", "def erase():\n    import server.app"),
    (crossing_rooms, "fl_sim/rounds.py", "from clients.app import app"),
    (crossing_rooms, "fl_sim/rounds.py", "import importlib\nimportlib.import_module('server.app')"),
    (crossing_rooms, "fl_sim/world.py", "if TYPE_CHECKING:\n    from server.samplers import Uniform"),
    (hydra_elsewhere, "fl_sim/world.py", "from hydra import compose"),
    (hydra_elsewhere, "clients/app.py", "import hydra.utils"),
    (flower_elsewhere, "fl_sim/rounds.py", "from flwr.app import Message"),
    (flower_elsewhere, "defenses/aggregation/krum.py", "import flwr"),
    (flower_elsewhere, "server/samplers.py", "import ray"),
    (swallowed_errors, "fl_sim/x.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (swallowed_errors, "fl_sim/x.py", "try:\n    f()\nexcept ValueError:\n    ..."),
    (swallowed_errors, "fl_sim/x.py", "try:\n    f()\nexcept:\n    g()"),
    (undocumented, "defenses/erasing/x.py", "class Eraser:\n    'Says what.'"),
    (undocumented, "clients/attacks/x.py", "'Says what.'\nclass Attack:\n    rate = 1"),
    (overlong, "defenses/erasing/x.py", "x = 1\n" * 200),
    (vague_names, "fl_sim/utils.py", ""),
    (vague_names, "clients/base_client.py", ""),
    (vague_names, "defenses/erasing/nad_v2.py", ""),
    (vague_names, "fl_sim/x.py", "class RunManager: ..."),
    (vague_names, "fl_sim/x.py", "def train(args): ..."),
    (global_randomness, "fl_sim/x.py", "torch.manual_seed(0)"),
    (global_randomness, "fl_sim/x.py", "x = np.random.rand(3)"),
    (global_randomness, "fl_sim/x.py", "import random"),
    (rules_in_print, "server/app.py", "print('round 3')"),
    (unpickling, "fl_sim/x.py", "import pickle"),
    (unpickling, "fl_sim/x.py", "torch.load(path, map_location='cpu')"),
    (unpickling, "fl_sim/x.py", "torch.load(path, weights_only=False)"),
    (unpickling, "fl_sim/x.py", "yaml.load(text, Loader=yaml.Loader)"),
    (unpickling, "fl_sim/x.py", "np.load(path, allow_pickle=True)"),
    (unpickling, "fl_sim/x.py", "eval(text)"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_a_rule_finds_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    """A checker that finds nothing in a file made to break its rule would find nothing anywhere."""
    assert rule(path, source)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Rule) -> None:
    """No file of the four packages breaks the rule."""
    assert [complaint for path, source in sources().items() for complaint in rule(path, source)] == []


def test_the_rules_allow_what_is_meant_to_be_allowed() -> None:
    """The allowed places really use what they are allowed, so an exception that nobody needs any more is noticed."""
    source = sources()
    assert all(any(n.startswith("hydra") for n in imported(source[path], path)) for path in ("fl_sim/composing.py",))
    for path in ("clients/app.py", "server/app.py", "fl_sim/engines/inprocess.py", "fl_sim/engines/flower.py"):
        assert any(name.startswith("flwr") for name in imported(source[path], path)), path
    assert crossing_rooms("defenses/erasing/nad.py", "from defenses.aggregation.mean import Mean\nimport fl_sim") == []


def test_flowers_private_parts_are_touched_in_one_module() -> None:
    """Flower's internals move between minor releases: only fl_sim/engines/flower.py (and Run's type) may know them.

    `Grid.run` is part of the public Grid and its type lives in `flwr.supercore.run`, so that one name is allowed.
    """
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.supercore.run")
    private = [
        f"{path} imports {name}"
        for path, source in sources().items()
        if path != "fl_sim/engines/flower.py"
        for name in imported(source, path)
        if name.startswith("flwr") and not name.startswith(public)
    ]
    assert private == []
    assert any("supercore.task_identity" in name for name in imported(sources()["fl_sim/engines/flower.py"]))


FORBIDDEN = ("trigger", "backdoor", "test", "malicious", "attack", "poison", "threat", "target")


def ground_truth(context: type) -> list[str]:
    """Fields of a context that name, by themselves or by their type, what only the attacker or the scorer knows.

    `assumed_attackers` is what the server supposes, not what is true.
    """
    return [
        field.name
        for field in dataclasses.fields(context)
        if field.name != "assumed_attackers"
        for word in FORBIDDEN
        if word in field.name.lower() or word in str(field.type).lower()
    ]


def test_a_defense_is_told_nothing_that_only_an_attacker_knows() -> None:
    """The information boundary is in the types: a threshold chosen by test ASR can't be written."""
    assert ground_truth(ServerContext) == []
    assert {"clean", "vector", "layout", "fit"} <= {field.name for field in dataclasses.fields(ServerContext)}


@pytest.mark.parametrize(("name", "kind"), [("test", "Samples"), ("who", "Backdoor"), ("malicious", "frozenset[int]")])
def test_a_leak_of_ground_truth_would_be_noticed(name: str, kind: str) -> None:
    """The check above finds a leaked field by its name as well as by its type."""
    leaky = dataclasses.make_dataclass("Leaky", [("round", int), (name, typing.ForwardRef(kind))])
    assert set(ground_truth(leaky)) == {name}


def test_no_room_is_reached_through_the_server_context() -> None:
    """A context that held the whole world would hold the test set: its types name none of the big containers."""
    kinds = " ".join(str(field.type) for field in dataclasses.fields(ServerContext))
    assert not re.search(r"\b(World|Parts|Settings|Federation|Config|Any|object)\b", kinds)
