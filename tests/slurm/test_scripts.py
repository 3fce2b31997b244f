"""The batch scripts without a Slurm: programs that they call are stand-ins which write down their words."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A project of scripts alone, with stand-ins for programs in bin/."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "bin").mkdir()
    for name in ("hpe-launch", "cogvlm-hpe"):
        stand_in(tmp_path, name, f'echo "$@" >> {tmp_path}/{name}.words')
    return tmp_path


def stand_in(place: Path, name: str, does: str) -> None:
    path = place / "bin" / name
    path.write_text(f"#!/bin/bash\n{does}\n")
    path.chmod(0o755)


def run(place: Path, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": f"{place}/bin:{os.environ['PATH']}", "HPE_HOME": str(place), "SLURM_SUBMIT_DIR": str(place)}
    command = ["bash", *map(str, words)]
    return subprocess.run(command, env=base | env, capture_output=True, text=True, timeout=60)


def test_each_stage_is_checked_as_it_will_start_and_named_where_it_fails(place: Path) -> None:
    stand_in(place, "sbatch", f'echo "$@" >> {place}/sbatch.words; wc -l < {place}/sbatch.words')
    (place / "base").mkdir()
    (place / "set").mkdir()
    (place / "set" / "index.json").touch()
    out = place / "out"
    stages = ["--weak", "weak.yaml", "--continued", "continued.yaml", "supervised.yaml"]
    done = run(place, "slurm/pipeline.sh", *stages, place / "base", place / "set", out, "--train.lr", "1")
    assert done.returncode == 0, done.stderr
    checked = (place / "cogvlm-hpe.words").read_text().splitlines()
    start = f"train --config {{}}.yaml --model.base {place}/base{{}} --train.lr 1 --check"
    assert checked == [
        start.format("weak", ""),
        start.format("supervised", f" --adapter.init {out}/weak/last"),
        start.format("continued", f" --adapter.init {out}/merged"),
    ]
    failed = (place / "sbatch.words").read_text().splitlines()[-1]
    assert "--dependency=afternotok:1?afternotok:2?" in failed
    assert f"failed.sh weak:1:{out}/hpe-weak-1.log supervised:2:{out}/hpe-supervised-2.log " in failed


@pytest.mark.parametrize(
    ("scontrol", "sacct", "said"),
    [
        (
            "echo JobId=7 JobName=x JobState=FAILED Reason=n ExitCode=3:0 StdOut=/o/l",
            "",
            "FAILED, exit code 3; its log: /o/l",
        ),
        ("exit 1", "echo 'CANCELLED by 0|0:15'", "CANCELLED, exit code 0; its log: /a:b/hpe-weak-7.log"),
        ("exit 1", "exit 1", "Slurm does not know any more how it ended; its log: /a:b/hpe-weak-7.log"),
    ],
)
def test_a_failed_stage_is_named_also_when_slurm_has_forgotten_it(
    place: Path, scontrol: str, sacct: str, said: str
) -> None:
    stand_in(place, "scontrol", scontrol)
    stand_in(place, "sacct", sacct)
    done = run(place, "slurm/failed.sh", "weak:7:/a:b/hpe-weak-7.log")
    assert done.stdout == f"hpe-weak (job 7): {said}\n"


def test_a_site_need_not_be_written_for_strict_shells(place: Path) -> None:
    (place / "site.conf").write_text('false\n[ "$LOADEDMODULES" ] || export SITE=read\nfalse\n')
    source = 'set -eu; . "$HPE_HOME/slurm/common.sh"; echo "$SITE $-"; echo "$unset"'
    done = run(place, "-c", source, HPE_SITE=str(place / "site.conf"))
    said, _, flags = done.stdout.strip().partition(" ")
    assert said == "read" and {"e", "u"} <= {*flags}, done.stderr
    assert done.returncode and "unset: unbound variable" in done.stderr
