"""Launchers: each makes the same runs in the same folders, refuses what can't run, and finds what is finished."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import tiny

from fl_sim import launchers
from fl_sim.cli import FAILED, OK, USAGE, main
from fl_sim.launchers import Submitted
from fl_sim.sweep import Outcome, execute, place

Capture = pytest.CaptureFixture[str]
SHORT = [word for word in tiny.TINY if not word.startswith("rounds=")]


def words(launcher: str, *more: str) -> list[str]:
    return ["run", "-m", *SHORT, "rounds=1", "name=sweep", f"hydra/launcher={launcher}", *more]


def launched(cwd: Path, capsys: Capture, *command: str) -> None:
    """One run is finished already, two are to be made, one can't be: all that told, and left, as ever."""
    assert execute([*SHORT, "rounds=1", "name=sweep", "seed=0", "trigger.size=2"]).state == "finished"
    [done] = cwd.rglob("done")
    before = done.stat().st_mtime_ns
    assert main([*command, "trigger.size=2,3,4,500", "seed=0"]) == FAILED
    shown = capsys.readouterr()
    assert shown.err.count("fl-sim: trigger.size=500") == 1
    assert "Traceback" not in shown.err
    assert shown.out.count("│ found finished") == 1
    assert shown.out.count("│ finished") == 2
    assert done.stat().st_mtime_ns == before
    folders = sorted(path.parent for path in cwd.rglob("done"))
    assert {folder.parent for folder in folders} == {cwd / "runs/sweeps/sweep"}
    assert len(folders) == 3
    assert main([*command, "trigger.size=2,3,4", "seed=0"]) == OK
    assert capsys.readouterr().out.count("│ found finished") == 3


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A worker stopped:UserWarning")
def test_joblib(cwd: Path, capsys: Capture) -> None:
    """Real processes of joblib's."""
    launched(cwd, capsys, *words("joblib", "hydra.launcher.n_jobs=2"))


def test_submitit_on_this_machine(cwd: Path, capsys: Capture) -> None:
    """Real processes of submitit's, through its pickles and its logs, as a cluster would run them."""
    pytest.importorskip("submitit")
    launched(cwd, capsys, *words("submitit_local"))
    assert list((cwd / "runs/sweeps/sweep/.submitit").glob("*/*_log.err"))


@pytest.mark.parametrize(
    ("launcher", "library"), [("joblib", "joblib"), ("submitit_local", "submitit"), ("submitit_slurm", "submitit")]
)
def test_a_missing_extra_is_named(
    launcher: str, library: str, cwd: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, status 2, before any run."""
    monkeypatch.setitem(sys.modules, library, None)
    assert main(words(launcher, "seed=0,1")) == USAGE
    error = capsys.readouterr().err
    assert error == f'fl-sim: hydra/launcher={library}: needs {library}: pip install "fl-sim[{library}]"\n'
    assert list(cwd.rglob("config.yaml")) == []


# Slurm, of which there is none here: its commands, as far as submitit needs them ------------------------------------

SBATCH = """#!/bin/bash
cp "${@: -1}" "$FAKE_SLURM/batch.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$FAKE_SLURM/batch.sh")
export SLURM_ARRAY_JOB_ID=99 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=here
(for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=$((100 + task)) SLURM_ARRAY_TASK_ID=$task bash "$FAKE_SLURM/batch.sh"
done) > /dev/null 2>&1 &
echo "Submitted batch job 99"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do
  case "$1" in --output | --error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""
SACCT = "#!/bin/bash\necho 'JobID|State|NodeList'\n"


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster of this machine: an array's tasks run one after another, while `sbatch` has long returned."""
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("slurm")
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def test_submitit_on_slurm(slurm: Path, cwd: Path, capsys: Capture) -> None:
    """An array of the two runs that are neither finished nor refused, with what was asked for it."""
    asked = ("partition=gpu", "timeout_min=30", "gpus_per_node=1", "array_parallelism=4", "mem_gb=4", "name=mine")
    asked += ("qos=long", "account=lab", "comment=c", "constraint=a100", "exclude=n1", "cpus_per_task=2")
    asked += ("additional_parameters={mail-user: me}", "setup=['export ASKED=1']", "srun_args=[-v]")
    launched(cwd, capsys, *words("submitit_slurm", *(f"hydra.launcher.{word}" for word in asked)))
    lines = (slurm / "batch.sh").read_text().splitlines()
    assert {
        "#SBATCH --array=0-1%2",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=30",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --mem=4GB",
        "#SBATCH --job-name=mine",
        "#SBATCH --qos=long",
        "#SBATCH --account=lab",
        "#SBATCH --constraint=a100",
        "#SBATCH --exclude=n1",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --mail-user=me",
        "#SBATCH --signal=USR2@120",
        "export ASKED=1",
    } <= set(lines)
    assert any(line.startswith("srun ") and " -v " in line for line in lines)


def test_slurms_refusal_is_one_line(slurm: Path, cwd: Path, capsys: Capture) -> None:
    """What `sbatch` says, as of a partition that there is not."""
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    assert main(words("submitit_slurm", "hydra.launcher.partition=gpu", "seed=0,1")) == FAILED
    *_, last = capsys.readouterr().err.splitlines()  # submitit repeats sbatch's own words before
    assert last == "fl-sim: submitit can't queue the runs: sbatch: error: invalid partition specified: gpu"


def test_no_slurm_is_one_line(cwd: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine from which nothing can be queued."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(cwd))
    assert main(words("submitit_slurm", "seed=0,1")) == USAGE
    error = capsys.readouterr().err
    assert error.startswith("fl-sim: hydra/launcher=submitit_slurm: ")
    assert error.count("\n") == 1


class Ended:
    """A submitted job that the cluster has ended."""

    job_id, state = "77_1", "TIMEOUT"
    paths = type("Paths", (), {"stderr": "log.err"})

    def result(self) -> Outcome:
        raise RuntimeError("a long story\nslurm says: out of time\n")


def test_a_job_that_the_cluster_ended_is_a_failed_run(cwd: Path) -> None:
    """With its number, its state and its log."""
    found = launchers._result(place([*tiny.TINY]), Ended())
    assert found.state == "failed: job 77_1 ended as TIMEOUT: slurm says: out of time; its log is log.err"
    assert found.summary is None


def test_a_job_that_is_queued_again_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitit asks for what to run next: the same job, which finds its checkpoint."""
    submitit = pytest.importorskip("submitit")
    again = Submitted("run").checkpoint(["seed=1"])
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.args == (["seed=1"],)
    assert json.dumps(again.function.command) == '"run"'
