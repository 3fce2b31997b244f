"""Files written a piece at a time are safetensors' own, byte for byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogvlm_hpe.model.stored import Entry, save_safetensors


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "z": torch.randn(3, 5),
        "a.weight": torch.randn(70, 9).bfloat16(),
        "b": torch.randn(1, 1, 4).half(),
        "ä": torch.randn(2, 0),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "ids": torch.arange(4),
        "small": torch.arange(4, dtype=torch.int32),
        "byte": torch.arange(3, dtype=torch.uint8),
    }
    done: list[int] = []
    entries = [
        Entry(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.reshape(-1).split(2) or [tensor])
        for name, tensor in tensors.items()
    ]
    save_safetensors(tmp_path / "ours", entries, lambda: done.append(1))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert len(done) == len(tensors)


@pytest.mark.parametrize("pieces", [[torch.zeros(3)], [torch.zeros(4).half()]])
def test_pieces_of_another_size_or_type_are_an_error(tmp_path: Path, pieces: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="a: "):
        save_safetensors(tmp_path / "x", [Entry("a", (4,), torch.float32, lambda: pieces)])
