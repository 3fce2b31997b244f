"""The front door: instant help, known exit codes, no traceback for a user's mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from cogvlm_hpe import __main__, cli
from cogvlm_hpe.cli import COMMANDS
from launcher import errors

HEAVY = ("torch", "transformers", "deepspeed")


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "cogvlm_hpe", *argv], capture_output=True, text=True, timeout=120)


def test_help_and_usage() -> None:
    helped = run("--help")
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in COMMANDS)
    assert run().returncode == 2
    wrong = run("trian")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("cogvlm-hpe: error: 'trian'")
    assert run("--version").stdout.startswith("cogvlm-hpe ")


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom cogvlm_hpe.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.rstrip().endswith("LOADED []"), done.stdout + done.stderr


def test_the_program_ends_as_its_command_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []

    def main() -> int:
        monkeypatch.setattr(errors, "end", lambda code: ends.append(f"the command's own way, {code}"))
        return 85

    monkeypatch.setattr(cli, "main", main)
    __main__.main()
    assert ends == ["the command's own way, 85"]


def test_the_launchers_own_flag_is_taken_off() -> None:
    assert run("--local_rank=1", "--version").returncode == 0


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    done = run("train", "--config", "nowhere.yaml")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere.yaml" in done.stderr


def test_a_config_can_be_checked_without_a_start(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{run_dir: nowhere, model: {base: tiny}, shards: {train: [{path: missing}]}}")
    assert run("train", "--config", str(config), "--check").returncode == 0
    assert run("train", "--config", str(config), "--check", "--train.lr", "quick").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
