"""The packaged base against a training that makes it anew."""

import json
import shutil
from pathlib import Path

import pytest

from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.tiny import check
from launcher.errors import UserError


def test_the_start_of_a_training_is_compared_with_the_packaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = resolve_base("tiny")
    curve = tmp_path / "metrics.jsonl"
    shutil.copy(base / "metrics-tower.jsonl", curve)
    lines = curve.read_text().splitlines()
    curve.write_text("\n".join(lines[:2]))
    check(tmp_path, base)
    assert capsys.readouterr().out.count("step") == 2
    first = json.loads(lines[0])
    curve.write_text(json.dumps(first | {"train/loss_auxiliary": 1.02 * first["train/loss_auxiliary"]}))
    with pytest.raises(UserError, match="step 25: .* recipe or code differ"):
        check(tmp_path, base)
    curve.write_text(json.dumps(first | {"global_step": 7}))
    with pytest.raises(UserError, match="no step in common"):
        check(tmp_path, base)
