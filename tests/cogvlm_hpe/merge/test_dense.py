"""Whole weights: what is in them, in both forms, over ranks, after an interruption, and what is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from merging import make_cogvlm_adapter, run
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from cogvlm_hpe.merge import dense, factors, report
from cogvlm_hpe.model.load import load
from cogvlm_hpe.model.weights import open_weights
from launcher.errors import UsageError, UserError

HF = Path(__file__).parents[2] / "data" / "tiny0" / "hf"
TIES = ("--method", "ties", "--density", "0.3")
SMALL_FILES = ("--output", "hf", "--max-shard-gb", "0.0003")
_MPIRUN = Path(sys.executable).with_name("mpirun")


def make_base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The tiny CogVLM in another dtype."""
    folder.mkdir()
    (folder / "config.json").write_text((HF / "config.json").read_text())
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(HF / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def pair(tmp_path: Path, base: Path) -> list[Path]:
    return [make_cogvlm_adapter(tmp_path / name, base, seed, rank=2 + seed) for seed, name in enumerate("ab", 1)]


def merge(base: Path, adapters: list[Path], out: Path, *flags: str) -> Path:
    run(SimpleNamespace(path=base), adapters, out, *flags)
    return out


def wanted_sum(base: Path, adapters: list[Path]) -> dict[str, torch.Tensor]:
    """W + ΔW, float64."""
    weights = open_weights(base)
    out = {name: weights.read(name).double() for name in weights.names()}
    for path in adapters:
        for layer, factor in factors.read_adapter(path).factors.items():
            out[f"{layer}.weight"] = out[f"{layer}.weight"] + factor.delta()
    return out


@pytest.mark.parametrize("flags", [("hf",), ("sat",), ("sat", "--mp", "2")])
def test_weights_are_the_sum_rounded_once(tmp_path: Path, base: Path, pair: list[Path], flags: tuple[str, ...]) -> None:
    out = merge(base, pair, tmp_path / "out", "--method", "cat", "--output", *flags)
    found, wanted = open_weights(out), wanted_sum(base, pair)
    assert found.names() == sorted(wanted)
    for name in found.names():
        assert found.dtype(name) == torch.bfloat16
        step = wanted[name].abs() * 2**-8 + 1e-7  # half a step of bf16, and the float32 sum before it
        assert bool(((found.read(name).double() - wanted[name]).abs() <= step).all()), name
    rows = {row["layer"]: row["lost_by_rounding"] for row in json.loads((out / "merge.json").read_text())["layers"]}
    assert len(rows) == 6
    for layer, loss in rows.items():
        exact, plain = wanted[f"{layer}.weight"], open_weights(base).read(f"{layer}.weight").double()
        lost = (found.read(f"{layer}.weight").double() - exact).norm() / (exact - plain).norm()
        assert loss == pytest.approx(float(lost), rel=1e-3)
    hpe = json.loads((out / "hpe.json").read_text())
    assert hpe["scope"] == "all" and hpe["answer_format"] == "offset" and "base_fingerprint" not in hpe
    assert "| lost by rounding |" in (out / "merge.md").read_text()


@pytest.mark.parametrize(("flags", "within"), [(("--method", "cat"), 0.1), (TIES, 0.25)])
def test_the_loss_of_rounding_is_told_before_it_happens(
    tmp_path: Path, base: Path, pair: list[Path], flags: tuple[str, ...], within: float,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dense, "SAMPLED_ROWS", 16)  # of 64 and 192
    told = {}
    real = dense.expected_losses
    monkeypatch.setattr(dense, "expected_losses", lambda *given: told.setdefault("losses", real(*given)))
    out = merge(base, pair, tmp_path / "out", *flags, "--output", "hf")
    expected = told["losses"]
    rows = json.loads((out / "merge.json").read_text())["layers"]
    assert len(rows) == len(expected) == 6
    for row in rows:
        assert expected[row["layer"]] == pytest.approx(row["lost_by_rounding"], rel=within)
    said = capsys.readouterr().out
    assert all(f"{loss:7.2%}  {layer}\n" in said[: said.index("in the middle")] for layer, loss in expected.items())
    assert said.index("rounding will") < said.index("wrote")


def test_elements_wise_weights_equal_those_of_the_exact_adapter(tmp_path: Path, pair: list[Path], base: Path) -> None:
    weights = open_weights(merge(base, pair, tmp_path / "dense", *TIES, "--output", "hf"))
    adapter = merge(base, pair, tmp_path / "adapter", *TIES, "--rank", "999")
    for name, tensor in wanted_sum(base, [adapter]).items():
        assert torch.equal(weights.read(name), tensor.to(torch.bfloat16)), name


def test_layers_that_lost_are_the_bases_bits(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    out = merge(base, pair[:1], tmp_path / "out", "--quantile", "0.5", "--output", "hf")
    rows = json.loads((out / "merge.json").read_text())["layers"]
    before, after = open_weights(base), open_weights(out)
    for row in rows:
        same = torch.equal(before.read(f"{row['layer']}.weight"), after.read(f"{row['layer']}.weight"))
        assert same == (row["winner"] == "base")
    assert {row["winner"] for row in rows} == {"base", "tuned"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


_COMMANDS = "import json, sys; from cogvlm_hpe.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"


@pytest.mark.slow
def test_ranks_write_the_same_bytes(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    forms = {
        "hf": (*TIES, *SMALL_FILES),
        "sat": (*TIES, "--output", "sat", "--mp", "2"),
        "adapter": (*TIES, "--rank", "8"),
        "layerwise": ("--granularity", "module"),
    }
    adapters = {name: pair[:1] if name == "layerwise" else pair for name in forms}
    commands = [
        ["merge", "--base", str(base), *(f"--adapter={path}" for path in adapters[name]), *flags]
        + ["--out", str(tmp_path / "two" / name)]
        for name, flags in forms.items()
    ]
    command = [str(_MPIRUN), "-np", "2", sys.executable, "-c", _COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for name, flags in forms.items():
        alone = merge(base, adapters[name], tmp_path / "one" / name, *flags)
        assert files_of(tmp_path / "two" / name) == files_of(alone), name
    for pattern in ("hf/*.safetensors", "sat/1/*.pt"):
        assert len(list((tmp_path / "two").glob(pattern))) >= 2  # something to share out


def test_a_merge_that_was_killed_while_it_was_described_goes_on(
    tmp_path: Path, base: Path, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = report.tensorboard

    def killed(folder: Path, text: str) -> None:
        real(folder, text)
        raise KeyboardInterrupt

    with monkeypatch.context() as place, pytest.raises(KeyboardInterrupt):
        place.setattr(report, "tensorboard", killed)
        merge(base, pair[:1], tmp_path / "out", "--method", "layerwise", "--output", "hf")
    merge(base, pair[:1], tmp_path / "out", "--method", "layerwise", "--output", "hf")
    assert (tmp_path / "out/tensorboard/events.out.tfevents.merge").is_file()


def test_an_interrupted_merge_goes_on_where_it_was(
    tmp_path: Path, base: Path, pair: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = merge(base, pair, tmp_path / "whole" / "out", *TIES, *SMALL_FILES)
    written: list[str] = []
    real = dense.convert.write_shard

    def third_fails(weights: object, path: Path, names: list[str], done: Callable[[], None]) -> None:
        if len(written) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        real(weights, path, names, done)

    monkeypatch.setattr(dense.convert, "write_shard", third_fails)
    out = tmp_path / "part" / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(base, pair, out, *TIES, *SMALL_FILES)
    assert not out.exists()
    with pytest.raises(UserError, match=r"unfinished by a merge with other settings.*remove it"):
        merge(base, pair, out, "--method", "ties", "--density", "0.4", *SMALL_FILES)
    again: list[str] = []
    monkeypatch.setattr(dense.convert, "write_shard", lambda w, p, *rest: (again.append(p.name), real(w, p, *rest)))
    merge(base, pair, out, *TIES, *SMALL_FILES)
    assert set(again).isdisjoint(written) and again
    assert f"2 of {len(again) + 2} files are there" in capsys.readouterr().out
    assert files_of(out) == files_of(whole)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_nan_in_any_tensor_is_named(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, base / "model.safetensors")
    for path in pair:
        (path / "hpe.json").unlink()
    with pytest.raises(UserError, match=r"model\.norm\.weight: holds NaN"):
        merge(base, pair, tmp_path / "out", "--method", "cat", "--output", "hf")


def test_weights_cannot_say_text_only(tmp_path: Path, tiny_set: Callable[..., Path]) -> None:
    base = write_tiny_model(tmp_path / "base", tiny_set(samples=8), steps=0)
    adapter = make_cogvlm_adapter(tmp_path / "a", base, scope="text")
    with pytest.raises(UserError, match=r"scope text.*--output adapter.*--every-token"):
        merge(base, [adapter], tmp_path / "out", "--method", "cat", "--output", "hf")
    with pytest.raises(UserError, match=r"--method ties has none; merge with --rank N first"):
        merge(base, [adapter], tmp_path / "out", *TIES, "--output", "hf", "--every-token")
    out = merge(base, [adapter], tmp_path / "out", "--method", "cat", "--output", "hf", "--every-token")
    told = json.loads((out / "merge.json").read_text())["text_only_lost"]
    pixels, prompts = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)), [[5, 9, 30], [7, 8]]

    def answers(where: Path, scope: str | None = None) -> list[list[int]]:
        model = load(where).model
        model.adapter_scope = scope or model.adapter_scope
        return model.answer(pixels, [0, 0], prompts, 12)

    assert answers(out) == answers(adapter, "all")
    assert 0 < told["mean_logit_difference"] < told["largest_logit_difference"]
    assert "largest_logit_difference" in (out / "merge.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output", "hf", "--mp", "2"), "--mp belongs to --output sat"),
        (("--mp", "2"), "--mp belongs to --output sat"),
        (("--output", "hf", "--sweep", "0.5"), "leave one out"),
        (("--output", "sat", "--mp", "3"), "does not divide"),
        (("--max-shard-gb", "1"), "belongs to --output hf;"),
        (("--output", "sat", "--max-shard-gb", "1"), "belongs to --output hf;"),
        (("--every-token",), "belongs to --output hf or sat"),
    ],
)
def test_forms_that_cannot_be_meant(
    tmp_path: Path, base: Path, pair: list[Path], flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        merge(base, pair[:1], tmp_path / "out", *flags)


_MEMORY = """
import json, sys
from cogvlm_hpe.cli import main
for words in json.loads(sys.argv[1]):
    open("/proc/self/clear_refs", "w").write("5")
    assert main(words) == 0
"""


@pytest.mark.slow
def test_merge_peak_memory_below_bound(tmp_path: Path) -> None:
    """A base of 67 MB in layers of 2 MB takes no more than is said at the start, be it chosen from or written again."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"rms_norm_eps": 1e-05}')
    names = [f"model.layers.{n}.self_attn.language_expert_dense" for n in range(32)]
    layer = torch.randn(1024, 1024).bfloat16()
    tensors = {f"{name}.weight": layer.clone() for name in names} | {"lm_head.weight": layer[:8].clone()}
    save_file(tensors, base / "model.safetensors")
    pair = [make_cogvlm_adapter(tmp_path / name, base, seed) for seed, name in enumerate("ab", 1)]
    lean = ["merge", "--base", str(base), "--adapter", str(pair[0])]
    dense = [*lean, "--adapter", str(pair[1]), *TIES, "--output", "hf", "--max-shard-gb", "0.005"]
    commands = [
        [*words, "--out", str(tmp_path / name)] for name, words in (("warm", lean), ("lean", lean), ("dense", dense))
    ]
    # glibc gives back at once what is above its threshold, which else climbs to 32 MiB: real layers are beyond that.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", _MEMORY, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    said = [int(mb) for mb in re.findall(r"memory: at most (\d+) MB", done.stdout)]
    needed = [int(mb) for mb in re.findall(r"memory: (\d+) MB were needed", done.stdout)]
    base_mb = len(names) * layer.nbytes / 1e6
    assert len(said) == len(needed) == 3
    for at_most, mb in zip(said[1:], needed[1:], strict=True):
        assert 2 < mb <= at_most < base_mb, done.stdout
