"""SAT itself (package SwissArmyTransformer), in a process of its own, loads what we write, every key matched."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import next_port

from cogvlm_hpe.cli import main

DATA = Path(__file__).parents[2] / "data" / "tiny0"
SCRIPT = Path(__file__).parent / "sat_side.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sat") is None,
        reason="make test installs SwissArmyTransformer, without what it requires and loading does not use",
    ),
]


def loaded(folder: Path, out: Path, mp_size: int = 1, *flags: str) -> list[dict[str, torch.Tensor]]:
    """The state dict of SAT's model on each rank after its `load_checkpoint`, which found nothing it did not expect."""
    port = str(next_port())
    world = {"WORLD_SIZE": str(mp_size), "LOCAL_WORLD_SIZE": str(mp_size), "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, out / f"{rank}.pt", *flags],
            env=os.environ | world | {"MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(mp_size)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    for rank, text in zip(ranks, said, strict=True):
        assert rank.returncode == 0, text
        assert "unexpected_keys" not in text and "Missing" not in text, text
    assert "successfully loaded" in said[0]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(mp_size)]


def module_of(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"1/mp_rank_{rank:02d}_model_states.pt", weights_only=True)["module"]


@pytest.mark.parametrize("mp_size", [1, 2])
def test_sat_loads_a_base(tmp_path: Path, mp_size: int) -> None:
    assert main(["convert", str(DATA / "hf"), str(tmp_path / "sat"), "--to", "sat", "--mp", str(mp_size)]) == 0
    for rank, state in enumerate(loaded(tmp_path / "sat", tmp_path, mp_size)):
        written = module_of(tmp_path / "sat", rank)
        assert state.keys() == written.keys() and len(state) == 76
        for name, tensor in written.items():
            assert torch.equal(state[name], tensor), name


def test_sat_loads_a_lora_and_merges_it_as_we_do(tmp_path: Path) -> None:
    for words in ((DATA / "sat_lora", tmp_path / "hf", "--to", "hf"),
                  (tmp_path / "hf/adapter", tmp_path / "sat", "--to", "sat"),
                  (tmp_path / "hf/adapter", tmp_path / "merged", "--to", "sat", "--merge")):  # fmt: skip
        assert main(["convert", *map(str, words)]) == 0
    [state] = loaded(tmp_path / "sat", tmp_path)
    written = module_of(tmp_path / "sat")
    assert state.keys() == written.keys() and len(state) == 116
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())
    [state] = loaded(tmp_path / "sat", tmp_path, 1, "--merge")
    merged = module_of(tmp_path / "merged")
    assert state.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-6), name
