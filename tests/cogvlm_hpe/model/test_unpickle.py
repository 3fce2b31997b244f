"""Pickles of strangers: tensors come out, nothing runs, and what is refused is named."""

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ports import next_port

from cogvlm_hpe.model.pickled import Entry, save_entries
from cogvlm_hpe.model.unpickle import load_pickled
from launcher.errors import UserError

_DEEPSPEED = """
import argparse, os, random, sys
os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
import numpy as np
import torch
from cogvlm_hpe.train.engine import prepare_deepspeed
prepare_deepspeed()
import deepspeed
torch.manual_seed(0)
model = torch.nn.Linear(4, 4).bfloat16()
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters()),
    config={"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True},
)
rng = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
engine.save_checkpoint(sys.argv[1], tag="1", client_state=rng | {"args": argparse.Namespace(lr=0.1)})
torch.save(model.state_dict(), sys.argv[1] + "/plain.pt")
"""


class Attack:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def test_a_file_with_random_states_and_arguments_loads(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    content = {
        "module": {"w": torch.arange(6.0).reshape(2, 3)},
        "args": argparse.Namespace(lr=0.1, save=Path("/x")),
        "np_rng_state": np.random.get_state(),
        "generator": np.random.default_rng(0),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "loss": np.float64(0.5),
    }
    torch.save(content, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    found = load_pickled(path)
    assert torch.equal(found["module"]["w"], content["module"]["w"])
    assert found["random_rng_state"] == content["random_rng_state"]
    assert torch.equal(found["torch_rng_state"], content["torch_rng_state"])
    assert not isinstance(found["args"], argparse.Namespace) and not vars(found["args"])


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (shutil.copyfile, ("/proc/self/status", "{}"), "shutil.copyfile"),
        (getattr, ("os", "system"), "builtins.getattr"),
    ],
)
def test_an_attack_is_refused_by_name(tmp_path: Path, function: Any, arguments: tuple, name: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pt"
    filled = [word.format(mark) for word in arguments]
    torch.save({"module": {"w": torch.ones(1)}, "x": Attack(function, *filled)}, path)
    with pytest.raises(UserError, match=rf"a\.pt: refused, it asks for {name}:"):
        load_pickled(path)
    assert not mark.exists()


def test_the_same_attack_works_on_a_reader_without_care(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pt"
    torch.save({"x": Attack(os.system, f"touch {mark}")}, path)
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_an_attack_in_an_old_format_is_refused(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pt"
    torch.save({"x": Attack(os.system, f"touch {mark}")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"refused, it asks for posix\.system:"):
        load_pickled(path)
    assert not mark.exists()


def test_old_files_without_objects_load(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert load_pickled(tmp_path / "a.pt")["w"].tolist() == [0, 1, 2]


def test_nothing_is_read_before_it_is_used(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000), "x": argparse.Namespace()}, tmp_path / "a.pt")
    tensor = load_pickled(tmp_path / "a.pt")["w"]
    size = tensor.untyped_storage().nbytes()
    assert size == 4000 and str(tmp_path / "a.pt") in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("keep", [0, 3, 100, 2000])
def test_a_file_that_was_cut_is_named(tmp_path: Path, keep: int) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.pt: not a whole checkpoint file .*; copy it again") as error:
        load_pickled(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pt: no such file"):
        load_pickled(tmp_path / "a.pt")


@pytest.mark.slow
def test_what_deepspeed_writes_loads(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", _DEEPSPEED, str(tmp_path), str(next_port())],
        env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    path = tmp_path / "1/mp_rank_00_model_states.pt"
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    module, plain = load_pickled(path)["module"], torch.load(tmp_path / "plain.pt", weights_only=True)
    assert module.keys() == plain.keys() and all(torch.equal(module[name], plain[name]) for name in plain)


def test_what_is_written_is_what_torch_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(1, 1, 4).half(),
        "d": torch.randn(2, 0),
        "e": torch.randn(40, 30, dtype=torch.float64).T,
    }
    entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: [t]) for n, t in tensors.items()]
    save_entries(tmp_path / "a.pt", "module", entries)
    for mmap in (False, True):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)["module"]
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
            assert found[name].is_contiguous() and found[name].data_ptr() % 64 == 0
    wrong = Entry("a", (3, 4), torch.float32, lambda: [tensors["a"]])
    with pytest.raises(ValueError, match=r"a: 60 bytes, not 48"):
        save_entries(tmp_path / "b.pt", "module", [wrong])
