"""The commands of docs/evaluation.md can be meant, and its Python example runs with other paths."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvlm_hpe.cli import COMMANDS

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^    (?:mpirun.* )?cogvlm-hpe (.*)$", PAGE, re.MULTILINE))
def test_a_command_can_be_meant(line: str) -> None:
    name, *words = shlex.split(line)
    parser = argparse.ArgumentParser()
    import_module(COMMANDS[name]).add_arguments(parser)
    parser.parse_args(words)


def test_the_python_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)).save(picture)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for said, here in {"runs/merged": "tiny", "photo.jpg": str(picture)}.items():
        assert said in code
        code = code.replace(said, here)
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) >= 4
