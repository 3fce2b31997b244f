"""hpe-shards as its users start it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_source import TinySource

from shards import sources
from shards.cli import main
from shards.index import open_set
from shards.plans import set_and_ratio

ROOT = Path(__file__).parents[2]


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "SLURM_", "OMPI_"))}
    command = [sys.executable, "-m", "shards", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def tiny_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hpe-shards build tiny --samples N`."""

    def add_arguments(parser: "sources.argparse.ArgumentParser") -> None:
        parser.add_argument("--samples", type=int, default=12)

    entry = (add_arguments, lambda options: TinySource(options.samples))
    monkeypatch.setitem(sources.SOURCES, "tiny", entry)


@pytest.mark.parametrize(
    "command", [[], ["build"], ["build", "synthetic"], ["verify"], ["info"], ["preview"], ["order"], ["simulate"]]
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    heavy = ("torch", "numpy", "scipy", "rich", "PIL", "webdataset", "mpi4py", "numba")
    code = f"""
import sys
from shards.cli import main
try:
    main({[*command, "--help"]!r})
except SystemExit as end:
    assert end.code == 0
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: hpe-shards" in done.stdout


def test_version_and_usage_errors() -> None:
    version = program("--version")
    assert version.returncode == 0 and version.stdout.startswith("hpe-shards ")
    for wrong in ([], ["bake"], ["build", "synthetic"], ["verify"]):
        done = program(*wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_user_errors_are_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "info", "preview", "order"):
        assert main([command, str(tmp_path / "nowhere")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("hpe-shards: error: ") and said.count("\n") == 1
        assert "no such folder" in said


def test_build_verify_info_preview(
    tmp_path: Path, tiny_command: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("build tiny --samples 9 --out set --name small --samples-per-shard 4".split()) == 0
    assert sorted(path.name for path in Path("set").glob("*.tar")) == [f"small-00000{k}.tar" for k in range(3)]
    assert main(["verify", "set"]) == 0
    said = capsys.readouterr().out
    assert "set: good (every byte checked)" in said and "set: 9 samples, 13 heads\n  yaw   -180 |" in said
    assert main(["verify", "set", "--report", "out/report.json"]) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["good"] and report["checked"] == "every byte" and report["sets"][0]["counts"]["heads"] == 13
    assert main(["verify", "set", "--fast"]) == 0
    assert main(["info", "set"]) == 0
    said = capsys.readouterr().out
    assert "CC0-1.0" in said and "heads by yaw" in said and "█" in said
    assert re.search(r"heads with a pose +│ 13 ", said)
    assert main(["preview", "set", "--count", "4"]) == 0
    assert Path("set-preview.png").is_file()
    Path("set/small-000001.tar").unlink()
    assert main(["verify", "set", "--report", "out/report.json"]) == 1
    assert not json.loads(Path("out/report.json").read_text())["good"]
    assert "small-000001.tar: missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["preview", "--out", "sheet.xyz"], "--out sheet.xyz: '.xyz' is no kind of image that can be written"),
        (["preview", "--out", "sheet"], "--out sheet: '' is no kind of image"),
        (["preview", "--out", "file/sheet.png"], "--out file/sheet.png: cannot be written (File exists: file)"),
        (["preview", "--out", "folder.png"], "--out folder.png: cannot be written (it is a folder)"),
        (["verify", "--report", "file/report.json"], "--report file/report.json: cannot be written (File"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_the_work(
    tiny_set: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("folder.png").mkdir()
    monkeypatch.setattr("shards.index.ShardSet.read", lambda *_: pytest.fail("a sample was read"))
    assert main([words[0], str(tiny_set()), *words[1:]]) == 2
    assert said in capsys.readouterr().err


def test_build_in_another_order_with_smaller_images(
    tmp_path: Path, tiny_command: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "set")
    flags = ["--shuffle", "3", "--max-side", "32", "--reencode-jpeg", "80", "--max-shard-mb", "0.0205"]
    assert main(["build", "tiny", "--samples", "20", "--out", out, *flags]) == 0
    shard_set = open_set(out)
    assert shard_set.info["scope"] | {"shuffle": 3, "reencode_jpeg": 80, "max_side": 32} == shard_set.info["scope"]
    assert shard_set.record(0).image.width == 32 and shard_set.key(0) != "tiny-train-000000"
    assert all(tar.stat().st_size <= 20_500 for tar in (tmp_path / "set").glob("*.tar"))
    assert main(["verify", out]) == 0
    assert main(["build", "tiny", "--out", str(tmp_path / "other"), "--reencode-jpeg", "0"]) == 2
    assert "JPEG quality 0" in capsys.readouterr().err


def test_findings_beyond_fifty_are_counted(tiny_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_set(samples=60, samples_per_shard=60)
    tar = folder / "tiny-train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("… and ") and len([line for line in lines if "tar" in line]) >= 50


def order(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["order", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_order_does_not_depend_on_ranks_and_workers(
    tiny_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    mix = [f"{tiny_set(samples=20)}:0.75", f"{tiny_set(samples=6, split='more')}:0.25"]
    common = [*mix, "--seed", "3", "--batch", "8"]
    lines = order(capsys, *common, "--count", "6")
    assert len(lines) == 6 and all(len(line.split()) == 8 for line in lines)
    assert all(sum("more" in key for key in line.split()) == 2 for line in lines)
    assert order(capsys, *common, "--from", "2", "--count", "4", "--world", "4") == lines[2:]
    assert order(capsys, *common, "--count", "3", "--world", "2", "--workers", "2") == lines[:3]
    assert order(capsys, *mix, "--seed", "4", "--batch", "8", "--count", "6") != lines
    options = [*common, "--block-shards", "1", "--bucket-batches", "2", "--count", "3"]
    bucketed = order(capsys, *options)
    assert bucketed != lines[:3] and order(capsys, *options, "--world", "2", "--workers", "1") == bucketed


def test_order_refuses_what_cannot_be_meant(tiny_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_set())
    wrong = [
        (["--batch", "6", "--world", "4"], "batch 6: must be a multiple of the 4 ranks"),
        (["--count", "-1"], "--count -1: must be at least 0"),
        (["--from", "-1"], "--from -1: must be at least 0"),
        (["--world", "0"], "--world 0: must be at least 1"),
    ]
    for flags, said in wrong:
        assert main(["order", folder, *flags]) == 2
        assert said in capsys.readouterr().err
    assert main(["order", f"{folder}:often"]) == 2
    assert "expected DIR or DIR:RATIO" in capsys.readouterr().err


def test_folders_with_and_without_ratio(tmp_path: Path) -> None:
    odd = tmp_path / "run:3"
    odd.mkdir()
    assert set_and_ratio("data/a:0.25") == (Path("data/a"), 0.25)
    assert set_and_ratio("data/a") == (Path("data/a"), 1.0)
    assert set_and_ratio(str(odd)) == (odd, 1.0)
    assert set_and_ratio(f"{odd}:2") == (odd, 2.0)
    assert set_and_ratio("http://host/set") == ("http://host/set", 1.0)
    assert set_and_ratio("http://host:8000") == ("http://host:8000", 1.0)
    assert set_and_ratio("http://host:8000/set:0.1") == ("http://host:8000/set", 0.1)
    assert set_and_ratio("pipe:cat /a/{}") == ("pipe:cat /a/{}", 1.0)
    assert set_and_ratio("pipe:cat /a/{}:3") == ("pipe:cat /a/{}", 3.0)


@pytest.mark.slow
def test_simulate_says_what_a_lost_node_does(tiny_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ["--world", "512", "--workers", "8", "--lose-at", "100", "--world-after", "448", "--save-every", "30"]
    assert main(["simulate", "1000000:0.9", "100000:0.1", "--batch", "7168", *ranks]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1,100,000 samples, batches of 7,168: 156 steps an epoch of the largest set"
    assert said[1].startswith("start 1: steps 0 to 100 on 512 ranks x 8 workers: 14 images a rank and step, 12 to 13 ")
    assert said[2].startswith("start 2: steps 90 to 156 on 448 ranks x 8 workers: 16 images a rank and step, 8 to 9 ")
    assert said[3] == "lost with the node and done again, with the same samples: 10 steps"
    assert "set 0: epoch 0: 1,000,000 of 1,000,000, epoch 1: " in said[4] and "% of the 333,334 of a full" in said[4]
    assert said[-1] == "no sample came twice or was left out"
    assert main(["simulate", str(tiny_set(samples=40)), "--batch", "4", "--world", "2", "--bucket-batches", "2"]) == 0
    assert "heads of the fullest rank 1." in capsys.readouterr().out
    assert main(["simulate", "1000", "--batch", "16", "--bucket-batches", "16"]) == 0, "whole windows are exact"
    assert "64 steps an epoch" in capsys.readouterr().out
    assert main(["simulate", "1000", "--batch", "7168", "--world", "504"]) == 2
    assert "batch 7168: must be a multiple of the 504 ranks; take 7056 or 7560" in capsys.readouterr().err


@pytest.mark.slow
def test_rendered_scenes_are_the_same_bytes_over_two_ranks(tmp_path: Path) -> None:
    """The whole way as users go it: source, mpirun, build, verify."""
    flags = ["build", "synthetic", "--scenes", "6", "--image-size", "64", "--samples-per-shard", "2", "--out"]
    assert program(*flags, str(tmp_path / "one")).returncode == 0
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "-np", "2", sys.executable, "-m", "shards"]
    both = subprocess.run(
        [*mpirun, *flags, str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert both.returncode == 0, both.stderr
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 3 + 2
    checked = subprocess.run(
        [*mpirun, "verify", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert checked.returncode == 0 and checked.stdout.count("good") == 1, checked.stdout + checked.stderr
