"""The command line."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_sim import __version__
from fl_sim.errors import ConfigError, FolderError, RunError
from fl_sim.interruption import STOPS

if TYPE_CHECKING:
    from rich.console import Console

    from fl_sim.schema import Central

HELP = """\
fl-sim: backdoor attacks and defenses in federated learning, simulated.

  fl-sim run [KEY=VALUE ...]            one federated run
  fl-sim run -m KEY=A,B [...]           a sweep: one run for each combination
  fl-sim central [KEY=VALUE ...]        a centralized victim and what erasers=[A,B,...] make of it
  fl-sim resume DIR                     go on with an interrupted run, exactly
  fl-sim report DIR ... [-o OUT]        tables, tests over seeds and curves of any number of runs: one HTML page
  fl-sim compare DIR DIR [-o FILE]      where two runs differ, and what came of it
  fl-sim replay DIR                     run it once more: does it still give the same numbers?
  fl-sim list [GROUP]                   what there is to choose from
  fl-sim list partition --plot [KEY=VALUE ...] [-o FILE]
                                        how each partition divides the data, as a picture
  fl-sim gallery [KEY=VALUE ...] [-o FILE]
                                        a picture of every trigger
  fl-sim --version | --help

Examples
  fl-sim run
  fl-sim run trigger=blend eraser=fine_tune rounds=20 seed=3
  fl-sim run -m eraser=none,fine_tune,nad seed=0,1,2 name=compare

`fl-sim run --cfg` prints the composed configuration; `--config-dir DIR` adds a folder of your own choices;
`fl-sim run -m --jobs N` makes N runs at a time, or as many as fit with --jobs auto.
"""

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
PICTURES = (".png", ".pdf", ".svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 (it failed), 2 (it was asked wrongly) or 130 (interrupted)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`: a run must not stop for that, nor print into its own files
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    previous = {number: signal.getsignal(number) for number in STOPS}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = INTERRUPTED
    try:
        try:
            status = _answer(list(sys.argv[1:] if argv is None else argv))
        finally:
            _ignore_stops()  # a second Ctrl-C must not interrupt what follows
    except KeyboardInterrupt:
        _complain("interrupted", INTERRUPTED)
    for number, handler in previous.items():
        # Where the process ends now, nobody would catch the exception that Python makes of a further Ctrl-C.
        ending = argv is None and status == INTERRUPTED and handler is signal.default_int_handler
        signal.signal(number, signal.SIG_DFL if ending else handler)
    return status


def _ignore_stops() -> None:
    """Ignore signals from now on, also one that has arrived and was not acted on yet."""
    ignored = False
    while not ignored:
        try:
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN)
            ignored = True
        except KeyboardInterrupt:
            continue


def _answer(arguments: list[str]) -> int:
    """Run one command; whatever it fails of becomes a line and a status, but for faults of the program and Ctrl-C."""
    try:
        status = _command(arguments)
        sys.stdout.flush()
        return status
    except (ConfigError, FolderError) as error:
        return _complain(str(error), USAGE)
    except RunError as error:
        return _complain(str(error), FAILED)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; Python must not complain of it at exit
        return FAILED
    except OSError as error:
        _drop_output()
        if error.errno == errno.ENAMETOOLONG:
            return _complain(str(ConfigError(arguments[0], error.filename, "is too long for a file's name")), USAGE)
        return _complain(_reason(error), FAILED)


def _reason(error: OSError) -> str:
    """What the system refused, and for which file."""
    try:
        Path.cwd()
    except OSError:
        return "the working directory is not there any more"
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)


def _drop_output() -> None:
    """Let go of what stdout could not take: Python would try once more at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _command(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return OK
    if command in ("-V", "--version"):
        print(f"fl-sim {__version__}")
        return OK
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "central": _central,
        "resume": _resume,
        "report": _report,
        "compare": _compare,
        "replay": _replay,
        "list": _list,
        "gallery": _gallery,
    }
    if command not in commands:
        return _complain(f"{command}: no such command; there are {', '.join(commands)}", USAGE)
    if rest and rest[0] in ("-h", "--help"):
        print(HELP, end="")
        return OK
    if "" in rest:  # an unset variable of a shell's; as a folder it would be the current one
        return _complain(f"{command}: one of its words is empty", USAGE)
    Path.cwd()  # PyTorch would end the process where it is gone
    return commands[command](rest)


def _run(arguments: list[str]) -> int:
    overrides, flags = _split(arguments)
    from fl_sim import build, composing

    if "-m" in flags:
        if "--cfg" in flags:
            raise ConfigError("--cfg", "", "prints one run's configuration; leave out -m")
        return _sweep(overrides, flags)
    if "--jobs" in flags:
        raise ConfigError("--jobs", flags["--jobs"], "is for sweeps: add -m")
    config = composing.compose_config(overrides)
    if "--cfg" in flags:
        from omegaconf import OmegaConf

        build.build(config)
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return OK
    from fl_sim import execution
    from fl_sim.folder import new_run_folder

    settings = execution.prepare(config).parts.settings
    console = _console()
    console.print(_what(config), soft_wrap=True)  # first: where nothing can be printed, no folder is left
    folder = new_run_folder(settings.output, settings.name)
    console.print(str(folder), soft_wrap=True)
    with _resumable(folder):
        summary = execution.start(config, folder, ["fl-sim", "run", *arguments])
    _show_end(summary, folder, console)
    return OK


def _sweep(overrides: list[str], flags: Mapping[str, str]) -> int:
    """A run for each combination; the status is 1 if any failed."""
    from fl_sim.sweep_command import outcomes, show

    console = _console()
    found = outcomes(overrides, flags, "run", console, _resumable)
    show(found, console)
    return FAILED if any(outcome.summary is None for outcome in found) else OK


def _central(arguments: list[str]) -> int:
    """One victim, or with -m one for each combination, and the erasers' table."""
    overrides, flags = _split(arguments)
    if "--cfg" in flags:
        return _run([*overrides, "--cfg"])
    from fl_sim import composing, execution
    from fl_sim.central_table import central_table, write_tables
    from fl_sim.folder import new_run_folder

    console = _console()
    if "-m" not in flags:
        if "--jobs" in flags:
            raise ConfigError("--jobs", flags["--jobs"], "is for sweeps: add -m")
        config = composing.compose_config(overrides)
        world = execution.prepare(config)
        settings = world.parts.settings
        plan = settings.central.against(world.backdoor.goal.rule)
        console.print(_what_central(config, plan), soft_wrap=True)
        folder = new_run_folder(settings.output, settings.name)
        console.print(str(folder), soft_wrap=True)
        with _resumable(folder):
            summary = execution.start(config, folder, ["fl-sim", "central", *arguments])
        write_tables([summary], folder)
        console.print(central_table([summary]))
        return OK
    from fl_sim.sweep_command import outcomes, show_failures

    found = outcomes(overrides, flags, "central", console, _resumable)
    groups: dict[str, list[dict[str, Any]]] = {}
    for outcome in found:
        label = " ".join(word for word in outcome.job if not word.startswith(("seed=", "seeds.")))
        if outcome.summary is not None:
            groups.setdefault(label, []).append(outcome.summary)
    for label, summaries in groups.items():
        console.print(f"{label or 'default'}: {len(summaries)} seeds", soft_wrap=True)
        console.print(central_table(summaries))
    show_failures(found, console)
    return FAILED if any(outcome.summary is None for outcome in found) else OK


def _resume(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise ConfigError("resume", " ".join(arguments), "takes one run folder")
    from fl_sim import execution
    from fl_sim.folder import is_done

    folder = Path(arguments[0])
    console = _console()
    if is_done(folder):
        console.print(f"{folder} is finished already", soft_wrap=True)
    with _resumable(folder):
        summary = execution.resume(folder)
    if execution.is_central(folder):
        from fl_sim.central_table import central_table, write_tables

        write_tables([summary], folder)
        console.print(central_table([summary]))
        return OK
    _show_end(summary, folder, console)
    return OK


def _report(arguments: list[str]) -> int:
    """Read, group and compare any number of runs; what can't be read is said and left out."""
    out, folders = _output(arguments, "report")
    if not folders:
        raise ConfigError("report", "", "takes run folders, or folders that hold some: fl-sim report DIR ... [-o OUT]")
    from fl_sim.report.files import check_target, write
    from fl_sim.report.report import report_on
    from fl_sim.report.tables import terminal
    from fl_sim.report.wording import NOTE, left_out, overview

    check_target(out)
    report = report_on(folders)
    written = write(report, out, f"Report on {', '.join(folders)}")
    for line in left_out(report):
        _complain(f"left out: {line}", OK)
    console = _console()
    console.print(terminal(report))
    console.print(f"{overview(report)}. {NOTE}\n{' '.join(map(str, written))}", soft_wrap=True)
    return OK


def _compare(arguments: list[str]) -> int:
    """Two runs: what differs in their configurations, beside what came of them; with `-o` as a picture or a page."""
    out, folders = _output(arguments, "")
    if len(folders) != 2:
        raise ConfigError("compare", " ".join(folders), "takes two run folders: fl-sim compare DIR DIR [-o FILE]")
    wanted = out != Path()
    if wanted and out.suffix not in (*PICTURES, ".html"):
        raise ConfigError("-o", str(out), f"must end in {', '.join(PICTURES)} or .html")
    if wanted and not out.parent.is_dir():
        raise ConfigError("-o", str(out), f"there is no folder {out.parent}")
    if wanted and out.is_dir():
        raise ConfigError("-o", str(out), "is a folder; it must be a file's name")
    from fl_sim.report.pair import curve_table, difference_table, draw, number_table, pair

    found = pair(*folders)
    console = _console()
    console.print(f"1: {folders[0]}\n2: {folders[1]}", soft_wrap=True)
    console.print(difference_table(found) if found.differences else "their configurations are the same")
    console.print(number_table(found))
    console.print(curve_table(found))
    if out.suffix in PICTURES:
        draw(found, out)
    elif wanted:
        from fl_sim.report.files import write
        from fl_sim.report.report import report_on

        write(report_on(folders), out, f"{folders[0]} and {folders[1]}")
    if wanted:
        console.print(str(out), soft_wrap=True)
    return OK


def _replay(arguments: list[str]) -> int:
    """Execute a finished run again and compare the numbers; the status is 1 if they differ."""
    if len(arguments) != 1:
        raise ConfigError("replay", " ".join(arguments), "takes one run folder")
    from fl_sim.replay import replay

    console = _console()
    result = replay(Path(arguments[0]))
    for each in result.circumstances:
        console.print(f"not as it was: {each}", soft_wrap=True)
    if result.difference is not None:
        return _complain(f"the numbers differ: {result.difference}", FAILED)
    console.print(f"identical: all {result.events} events of {arguments[0]}, but for seconds", soft_wrap=True)
    return OK


def _output(arguments: Sequence[str], default: str) -> tuple[Path, list[str]]:
    """What `-o` names, and the words that are no options."""
    target, words = _named(arguments, default)
    if "-o" in arguments and not target:
        raise ConfigError("-o", "", "takes a file or a folder")
    for word in words:
        if word.startswith("-"):
            raise ConfigError(word, "", "no such option; there is -o OUT")
    return Path(target), words


def _list(arguments: list[str]) -> int:
    if "--plot" in arguments:
        return _plot([word for word in arguments if word != "--plot"])
    words, flags = _split(arguments)
    if flags:
        raise ConfigError(min(flags), "", "is for fl-sim run")
    names = [word for word in words if not word.startswith("hydra.searchpath=")]
    from fl_sim import build, composing

    if len(names) > 1 or (names and names[0] not in composing.GROUPS):
        raise ConfigError("group", " ".join(names), f"no such group; there are {', '.join(composing.GROUPS)}")
    folders = composing.search_folders(composing.parse([word for word in words if word not in names]))
    from rich.text import Text

    console = _console()
    for group in names or composing.GROUPS:
        rows = build.describe(group, folders)
        console.print(Text(group, style="bold"))
        width = max((len(name) for name, *_ in rows), default=0)
        for name, sentence, paper, fidelity in rows:
            about = "; ".join(part for part in (paper, f"fidelity: {fidelity}" if fidelity else "") if part)
            line = Text(f"  {name:<{width}}  {sentence}")
            line.append(f" [{about}]" if about else "", style="dim")
            console.print(line, soft_wrap=True)
    return OK


def _plot(arguments: list[str]) -> int:
    """Draw every choice of partition, or the one that is asked for, as it divides the configured data."""
    target, words = _target(arguments, "partitions.png")
    overrides, flags = _split([word for word in words if word != "partition"])
    if flags or "partition" not in words or not all("=" in word for word in overrides) or not target:
        raise ConfigError("--plot", "", "is used as fl-sim list partition --plot [KEY=VALUE ...] [-o FILE]")
    from fl_sim import composing, execution
    from fl_sim.partition.picture import Counts, draw_partitions, title

    drawn: dict[str, Counts] = {}
    refused: list[ConfigError] = []
    for config in composing.each_choice("partition", overrides):
        try:
            drawn[title(config)] = Counts.of(execution.prepare(config, fresh=False))
        except ConfigError as error:
            refused.append(error)
    if not drawn:
        raise refused[0]
    for refusal in refused:
        _complain(str(refusal), OK)
    draw_partitions(drawn, Path(target))
    _console().print(target, soft_wrap=True)
    return OK


def _named(arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """What follows `-o`, nothing if that is its last word, and the other words."""
    words = list(arguments)
    if "-o" not in words:
        return default, words
    at = words.index("-o")
    target = words[at + 1] if at + 1 < len(words) else ""
    del words[at : at + 2]
    return target, words


def _target(arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The file that `-o` names for a picture, checked before anything is drawn, and the other words."""
    target, words = _named(arguments, default)
    path = Path(target)
    if target and path.suffix not in PICTURES:
        raise ConfigError("-o", target, f"must be a picture's name: it ends in {', '.join(PICTURES)}")
    if target and not path.parent.is_dir():
        raise ConfigError("-o", target, f"there is no folder {path.parent}")
    if len(os.fsencode(path.name)) > 255:
        raise ConfigError("-o", target, "is too long for a file's name")
    return target, words


def _gallery(arguments: list[str]) -> int:
    """Draw every trigger, or that of a `trigger=` or `attack=`, on photographs or on the test images of `data=`."""
    target, words = _target(arguments, "gallery.png")
    overrides, flags = _split(words)
    if flags or not target:
        raise ConfigError(min(flags, default="-o"), "", "the gallery is fl-sim gallery [KEY=VALUE ...] [-o FILE]")
    from fl_sim import composing, gallery

    parsed = composing.parse(overrides)
    given = {override.key_or_group for override in parsed}
    drawn = gallery.draw(composing.compose_config(overrides), given, composing.search_folders(parsed), Path(target))
    console = _console()
    for each in drawn:
        if each.failure is not None:
            _complain(f"{each.name} could not be drawn: {each.failure}", FAILED)
    good = sum(each.failure is None for each in drawn)
    console.print(f"{good} of {len(drawn)} triggers: {target}", soft_wrap=True)
    return OK if good else FAILED


def _split(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Overrides, and flags with their values; `--config-dir DIR` becomes Hydra's own search path."""
    from fl_sim.composing import quoted

    overrides: list[str] = []
    flags: dict[str, str] = {}
    folders: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("-m", "--multirun"):
            flags["-m"] = ""
        elif word == "--cfg":
            flags["--cfg"] = ""
        elif word in ("-j", "--jobs") or word.startswith("--jobs="):
            flags["--jobs"] = word.partition("=")[2] if "=" in word else next(words, "")
        elif word in ("-cd", "--config-dir") or word.startswith("--config-dir="):
            folder = word.partition("=")[2] if "=" in word else next(words, "")
            if not Path(folder).is_dir() or not folder:
                raise ConfigError("--config-dir", folder, "no such folder")
            folders.append(quoted(f"file://{Path(folder).resolve()}"))
        elif word.startswith("-"):
            raise ConfigError(word, "", "no such option; there are -m, --jobs N, --cfg, --config-dir DIR, --help")
        else:
            overrides.append(word)
    if folders:
        overrides.append(f"hydra.searchpath=[{','.join(folders)}]")
    return overrides, flags


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say how to go on, if the run is interrupted, by whatever exception the interrupt came out in the end."""
    stopped = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    except BaseException as error:
        if not stopped and not isinstance(error, KeyboardInterrupt):
            raise
        print(
            f"\nstopped; all rounds up to the last checkpoint are kept. Go on with: fl-sim resume {folder}",
            file=sys.stderr,
        )
        raise KeyboardInterrupt from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _what(config: dict[str, Any]) -> str:
    groups = ("data", "partition", "model", "attack", "trigger", "aggregator", "eraser", "erasing")
    choices = config["choices"]
    cohort = f"{config['clients_per_round']} of {config['clients']} clients a round, {config['rounds']} rounds"
    return f"{' · '.join(str(choices[group]) for group in groups)} · {cohort} · seed {config['seed']}"


def _what_central(config: dict[str, Any], plan: Central) -> str:
    choices = config["choices"]
    names = " · ".join(str(choices[group]) for group in ("data", "model", "client", "trigger"))
    erasers = ", ".join(config["erasers"]) or choices["eraser"]
    return f"{names} · {plan.poison_rate:.0%} poisoned · {plan.epochs} epochs · {erasers} · seed {config['seed']}"


def _show_end(summary: dict[str, Any], folder: Path, console: Console) -> None:
    from fl_sim.console import detection_line, duration, final_table
    from fl_sim.summary import CURVES

    console.print(final_table(summary))
    for detection in summary.get("detections", []):
        console.print(f"detection: {detection_line(detection)}", soft_wrap=True)
    console.print(f"{summary['rounds']} rounds in {duration(summary['seconds'])}", soft_wrap=True)
    console.print(f"curves: {folder / CURVES}", soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def _complain(message: str, status: int) -> int:
    print(f"fl-sim: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
