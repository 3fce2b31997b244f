"""The commands of docs/merging.md can be meant, and its tables name every method."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from cogvlm_hpe.merge import command, settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")


def test_every_command_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # one names a packaged file
    lines = re.findall(r"^    .*cogvlm-hpe merge (.*?)(?:\s+#.*)?$", PAGE, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        parser = argparse.ArgumentParser(exit_on_error=False)
        command.add_arguments(parser)
        settings.check(command.read_settings(parser.parse_args(shlex.split(line))))


def test_every_method_and_flag_is_there() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    assert not [flag for flag in flags if flag not in PAGE]
    assert not [method for method in settings.METHODS if f"`{method}`" not in PAGE and method != "layerwise"]
