"""One run through all that ends a job, and beside it the same run undisturbed: the same bytes, and nobody left behind.

Two nodes with a rank each. Every disturbance comes after a step that is not saved yet.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import yaml
from private_slurm import Slurm
from tiny_source import TinySource

from launcher.comm import single
from shards.write import build

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1"]
STEPS = 48
T = TypeVar("T")
ADAPTER = "last/adapter_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small set and a config of the packaged base."""
    folder = tmp_path_factory.mktemp("storm")
    build(TinySource(samples=8), folder / "set", single(), 8)
    config = {
        "run_dir": "unset",
        "model": {"base": "tiny", "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["language.attention"], "scope": "text"},
        "shards": {"train": [{"path": str(folder / "set"), "ask": ["pose"]}], "batch": 2, "questions": 1},
        "train": {"max_steps": STEPS, "warmup_steps": 1, "micro_batch": 1, "save_every": 4, "log_every": 1},
    }
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


class Run:
    """A run, the job that makes it, and how long it took after each disturbance."""

    def __init__(self, slurm: Slurm, place: Path, name: str) -> None:
        self.slurm, self.place, self.folder = slurm, place, place / name
        self.job = 0
        self.figures: dict[str, str] = {}

    def submit(self, *options: str, words: tuple[str, ...] = ()) -> None:
        script = ["slurm/train.sh", str(self.place / "lora.yaml"), "--run-dir", str(self.folder), *words]
        self.job = self.slurm.submit(f"--output={self.place}/%j.log", *TWO_NODES, *options, *script, cwd=ROOT)

    def finish(self) -> str:
        """What the job printed, once it has ended well."""
        state, code, log = self.slurm.finish(self.job)
        assert (state, code) == ("COMPLETED", 0), log
        return log

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        values = [json.loads(line) for line in lines if line.endswith("\n")]
        return [value["global_step"] for value in values if "train/loss" in value]

    def wait_until(self, ready: Callable[[], T | None]) -> T:
        """What `ready` returns once it is something; looking costs little, asking Slurm does not."""
        deadline_s, asked_s = time.monotonic() + 240, time.monotonic()
        while not (found := ready()):
            if time.monotonic() > asked_s + 2:
                asked_s, job = time.monotonic(), self.slurm.job(self.job)
                ended = job["JobState"] in ("COMPLETED", "FAILED")
                assert asked_s < deadline_s and not ended, f"{job}\n{self.slurm.log(job)}"
            time.sleep(0.05)
        return found

    def wait_for(self, said: str, after_s: float) -> float:
        """Unix time of the first line of the run's log since `after_s` that says so."""

        def look() -> float | None:
            for line in (self.folder / "log.txt").read_text().splitlines():
                day, clock, text = line.split(" ", 2)
                at_s = datetime.fromisoformat(f"{day} {clock}").timestamp()
                if at_s >= after_s and re.search(said, text):
                    return at_s
            return None

        return self.wait_until(look)

    def processes(self) -> list[tuple[psutil.Process, list[str]]]:
        """All processes of the run and their words: batch script, launcher, srun and ranks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.folder) in (words := process.cmdline()):
                    found.append((process, words))
        return found

    def unsaved(self) -> bool:
        """Whether the newest step is that of no checkpoint."""
        saved = [int(path.parent.name[5:]) for path in self.folder.glob("checkpoints/step-*/manifest.json")]
        return max(self.steps(), default=0) > max(saved, default=0)

    def strike(self, blow: Callable[[list[psutil.Process]], object]) -> tuple[list[psutil.Process], float]:
        """The ranks, and the Unix time from which they felt the blow: they are held until it has been dealt, so that
        on a quick machine the run is not through before Slurm has acted.
        """
        self.wait_until(self.unsaved)
        ranks = [process for process, words in self.processes() if words[1:3] == ["-m", "cogvlm_hpe"]]
        assert len(ranks) == 2, ranks
        for rank in ranks:
            rank.suspend()
        blow(ranks)
        struck_s = time.time()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()
        return ranks, struck_s

    def survive(self, what: str, blow: Callable[[list[psutil.Process]], object], start: int, saves: bool) -> None:
        """Strike; then the run must step again in start `start` of its job, and the ranks of before be gone."""
        ranks, struck_s = self.strike(blow)
        saved = f"saved after {self.wait_for('stopped after', struck_s) - struck_s:.1f} s, " if saves else ""
        self.slurm.mend("node2")
        self.slurm.wait_for_start(self.job, start)
        started_s = time.time()
        stepped_s = self.wait_for(r"step \d+  ", self.wait_for(" ranks × ", struck_s))
        self.figures[what] = (
            f"{saved}started again after {started_s - struck_s:.1f} s, first step after {stepped_s - struck_s:.1f} s"
        )
        assert not any(lives(rank) for rank in ranks), f"{what}: ranks left behind"


def lives(process: psutil.Process) -> bool:
    """Whether it runs; nobody may be there to reap a dead one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_whatever_ends_it_the_run_comes_out_the_same(
    slurm: Slurm, place: Path, record_property: Callable[[str, str], None]
) -> None:
    calm, storm = Run(slurm, place, "calm"), Run(slurm, place, "storm")
    calm.submit()
    assert "✓ pairs of hosts" in calm.finish(), "every start looks at its nodes first"
    storm.submit()

    def limit(_: list[psutil.Process]) -> None:
        # Less than the two minutes of slurm/train.sh are left then, so that Slurm tells the job when it looks next.
        started_s = datetime.fromisoformat(slurm.job(storm.job)["StartTime"]).timestamp()
        minutes = int(time.time() - started_s) // 60
        slurm.call("scontrol", "update", f"JobId={storm.job}", f"TimeLimit={minutes + 2}")
        storm.wait_until(lambda: "SIGUSR1: asking" in (place / f"{storm.job}.log").read_text())
        slurm.call("scontrol", "update", f"JobId={storm.job}", "TimeLimit=30")  # of the starts to come

    def down(_: list[psutil.Process]) -> None:
        slurm.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
        slurm.wait_while_running(storm.job)

    def preempt(_: list[psutil.Process]) -> None:
        words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
        slurm.submit(*words, cwd=ROOT)
        slurm.wait_while_running(storm.job)

    storm.survive("time limit", limit, start=2, saves=True)
    storm.survive("scancel --signal", lambda _: slurm.call("scancel", "--signal=USR1", str(storm.job)), 3, saves=True)
    storm.survive("kill -9 of a rank", lambda ranks: ranks[1].kill(), start=3, saves=False)
    storm.survive("a node set down", down, start=4, saves=False)
    storm.survive("pre-emption", preempt, start=5, saves=True)
    _, cancelled_s = storm.strike(lambda _: slurm.call("scancel", str(storm.job)))
    storm.wait_for("stopped after", cancelled_s)
    state, _, log = slurm.finish(storm.job)
    assert state == "CANCELLED" and slurm.job(storm.job)["Restarts"] == "4", log
    assert log.count("back into the queue") == 2
    storm.submit(words=("--resume",))
    storm.finish()
    assert storm.steps() == calm.steps() == list(range(1, STEPS + 1)), "no step is lost or told twice"
    assert (storm.folder / ADAPTER).read_bytes() == (calm.folder / ADAPTER).read_bytes()
    starts = json.loads((storm.folder / "run.json").read_text())["starts"]
    assert len(starts) == 7 and {start["ranks"] for start in starts} == {2}
    assert not calm.processes() and not storm.processes(), "processes left behind"
    for what, seconds in storm.figures.items():
        record_property(what, seconds)
