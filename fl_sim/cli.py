"""The command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_sim import __version__
from fl_sim.errors import ConfigError, RunError
from fl_sim.interruption import STOPS

if TYPE_CHECKING:
    from rich.console import Console

HELP = """\
fl-sim: backdoor attacks and defenses in federated learning, simulated.

  fl-sim run [KEY=VALUE ...]            one federated run
  fl-sim run -m KEY=A,B [...]           a sweep: one run for each combination
  fl-sim resume DIR                     go on with an interrupted run, exactly
  fl-sim list [GROUP]                   what there is to choose from
  fl-sim --version | --help

Examples
  fl-sim run
  fl-sim run trigger=blend eraser=fine_tune rounds=20 seed=3
  fl-sim run -m eraser=none,fine_tune,nad seed=0,1,2 name=compare

`fl-sim run --cfg` prints the composed configuration; `--config-dir DIR` adds a folder of your own choices.
"""

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 (it failed), 2 (it was asked wrongly) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return OK
    if command in ("-V", "--version"):
        print(f"fl-sim {__version__}")
        return OK
    commands: dict[str, Callable[[list[str]], int]] = {"run": _run, "resume": _resume, "list": _list}
    if command not in commands:
        return _complain(f"{command}: no such command; there are {', '.join(commands)}", USAGE)
    if rest and rest[0] in ("-h", "--help"):
        print(HELP, end="")
        return OK
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return commands[command](rest)
    except ConfigError as error:
        return _complain(str(error), USAGE)
    except RunError as error:
        return _complain(str(error), FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; Python must not complain of it at exit
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: list[str]) -> int:
    overrides, flags = _split(arguments)
    from fl_sim import build

    if "-m" in flags:
        if "--cfg" in flags:
            raise ConfigError("--cfg", "", "prints one run's configuration; leave out -m")
        return _sweep(overrides)
    config = build.compose_config(overrides)
    if "--cfg" in flags:
        from omegaconf import OmegaConf

        build.build(config)
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return OK
    from fl_sim import execution
    from fl_sim.folder import new_run_folder

    settings = execution.prepare(config).parts.settings
    folder = new_run_folder(settings.output, settings.name)
    console = _console()
    console.print(f"{_what(config)}\n{folder}", soft_wrap=True)
    with _resumable(folder):
        summary = execution.start(config, folder, ["fl-sim", "run", *arguments])
    _show_end(summary, folder, console)
    return OK


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
    _show_end(summary, folder, console)
    return OK


def _sweep(overrides: list[str]) -> int:
    """Check every job, run the good ones in turn, and say at the end what became of each."""
    from fl_sim import build, execution
    from fl_sim.folder import is_done, sweep_folder

    console = _console()
    outcomes: list[tuple[str, str, dict[str, Any] | None]] = []
    jobs = build.jobs(overrides)
    for number, job in enumerate(jobs, start=1):
        label = " ".join(job)
        console.print(f"[{number}/{len(jobs)}] {label}", soft_wrap=True)
        try:
            config = build.compose_config(job)
            settings = execution.prepare(config).parts.settings
            folder = sweep_folder(settings.output, settings.name, build.config_hash(config))
            with _resumable(folder):
                if (folder / "config.yaml").exists():
                    state = "found finished" if is_done(folder) else "resumed"
                    summary = execution.resume(folder)
                else:
                    state = "finished"
                    summary = execution.start(config, folder, ["fl-sim", "run", *job])
        except (ConfigError, RunError) as error:
            _complain(str(error), FAILED)
            outcomes.append((label, f"failed: {error}", None))
        except Exception as error:  # a fault in one job must not stop the others; it is shown in full
            import traceback

            traceback.print_exc()
            outcomes.append((label, f"failed: {type(error).__name__}: {error}", None))
        else:
            outcomes.append((label, state, summary))
    _show_sweep(outcomes, console)
    return FAILED if any(summary is None for _, _, summary in outcomes) else OK


def _list(arguments: list[str]) -> int:
    words, flags = _split(arguments)
    if flags:
        raise ConfigError(min(flags), "", "is for fl-sim run")
    names = [word for word in words if not word.startswith("hydra.searchpath=")]
    from fl_sim import build

    if len(names) > 1 or (names and names[0] not in build.GROUPS):
        raise ConfigError("group", " ".join(names), f"no such group; there are {', '.join(build.GROUPS)}")
    folders = build.search_folders(build.parse([word for word in words if word not in names]))
    from rich.text import Text

    console = _console()
    for group in names or build.GROUPS:
        rows = build.describe(group, folders)
        console.print(Text(group, style="bold"))
        width = max((len(name) for name, *_ in rows), default=0)
        for name, sentence, paper, fidelity in rows:
            about = "; ".join(part for part in (paper, f"fidelity: {fidelity}" if fidelity else "") if part)
            line = Text(f"  {name:<{width}}  {sentence}")
            line.append(f" [{about}]" if about else "", style="dim")
            console.print(line, soft_wrap=True)
    return OK


def _split(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Overrides and flags; `--config-dir DIR` becomes Hydra's own search path."""
    overrides: list[str] = []
    flags: set[str] = set()
    folders: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("-m", "--multirun"):
            flags.add("-m")
        elif word == "--cfg":
            flags.add("--cfg")
        elif word in ("-cd", "--config-dir") or word.startswith("--config-dir="):
            folder = word.partition("=")[2] if "=" in word else next(words, "")
            if not Path(folder).is_dir() or not folder:
                raise ConfigError("--config-dir", folder, "no such folder")
            folders.append(f"file://{Path(folder).resolve()}")
        elif word.startswith("-"):
            raise ConfigError(word, "", "no such option; there are -m, --cfg, --config-dir DIR, --help")
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


def _show_end(summary: dict[str, Any], folder: Path, console: Console) -> None:
    from fl_sim.console import duration, final_table
    from fl_sim.summary import CURVES

    console.print(final_table(summary))
    console.print(f"{summary['rounds']} rounds in {duration(summary['seconds'])}", soft_wrap=True)
    console.print(f"curves: {folder / CURVES}", soft_wrap=True)


def _show_sweep(outcomes: list[tuple[str, str, dict[str, Any] | None]], console: Console) -> None:
    from rich.table import Table

    from fl_sim.console import shown

    table = Table()
    for heading in ("run", "ACC", "ASR", "highest ASR", ""):
        table.add_column(heading, justify="right" if heading.isupper() or "ASR" in heading else "left", overflow="fold")
    for label, state, summary in outcomes:
        numbers = ("acc", "asr", "asr_max")
        table.add_row(label, *(shown(summary[key]) if summary else "–" for key in numbers), state)
    console.print(table)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def _complain(message: str, status: int) -> int:
    print(f"fl-sim: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
