"""The packaged base against a training that makes it anew."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.tiny import STAGES, check, take
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


def test_the_package_takes_the_last_stage_and_the_curves_of_all(tmp_path: Path) -> None:
    package, weights = tmp_path / "package", {"x": torch.tensor([1.0, 0.1])}
    package.mkdir()
    for stage in STAGES:
        last = tmp_path / stage / "last"
        last.mkdir(parents=True)
        save_file({name: len(stage) * tensor for name, tensor in weights.items()}, last / "model.safetensors")
        if stage != "whole":
            (tmp_path / stage / "metrics.jsonl").write_text(f'{{"global_step": {len(stage)}}}')
    with pytest.raises(UserError, match="whole/metrics.jsonl: no such file"):
        take(tmp_path, package)
    assert not list(package.iterdir())
    (tmp_path / "whole" / "metrics.jsonl").write_text("{}")
    take(tmp_path, package)
    taken = load_file(package / "model.safetensors")
    assert torch.equal(taken["x"], (len("attributes") * weights["x"]).bfloat16())
    assert {path.name for path in package.glob("*.jsonl")} == {f"metrics-{stage}.jsonl" for stage in STAGES}
