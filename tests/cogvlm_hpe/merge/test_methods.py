"""Every method against a dense float64 computation of its own, and one adapter as the identity of all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import make_adapter, make_base, make_tower, run, tuned_weights
from safetensors.torch import load_file

from cogvlm_hpe.merge import factors, sparse
from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.settings import ELEMENTWISE, METHODS
from launcher.errors import UsageError, UserError

FULL = ("--rank", "99")  # of layers 24 wide: exact


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base")


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Differing ranks, scalings (rsLoRA) and layers: only the second has down_proj, only the first up_proj."""
    second = ["query_key_value", "dense", "down_proj"]
    return [
        make_adapter(tmp_path / "a"),
        make_adapter(tmp_path / "b", seed=2, r=3, use_rslora=True, target_modules=second),
    ]


def changes(path: Path) -> dict[str, np.ndarray]:
    """ΔW by peft itself, float64."""
    plain = make_tower().double().state_dict()
    return {
        name: (tensor - plain[f"{name}.weight"]).numpy()
        for name, tensor in tuned_weights(path).items()
        if f"{name}.weight" in plain
    }


def largest(change: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(-np.abs(change), axis=None, kind="stable")
    out = np.zeros(change.size)
    out[order[:count]] = change.reshape(-1)[order[:count]]
    return out.reshape(change.shape)


def by_hand(method: str, parts: list[np.ndarray], weights: list[float], density: float, gamma: float) -> np.ndarray:
    """Plain numpy, written from the papers' formulas; the parts are all adapters', 0 where one lacks the layer."""
    if method == "linear":
        return sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)
    if method in ("task-arithmetic", "cat"):
        return sum(w * p for w, p in zip(weights, parts, strict=True))
    size = parts[0].size
    if method == "breadcrumbs":
        stay, top = int(density * size), min(int(gamma * size), size - int(density * size))
        sparse_parts = [largest(p, stay + top) - largest(p, top) for p in parts]
    else:
        sparse_parts = [largest(p, max(1, int(density * size))) for p in parts]
    scaled = np.stack([w * p for w, p in zip(weights, sparse_parts, strict=True)])
    if method != "ties":
        return scaled.sum(0)
    sign = np.where(scaled.sum(0) >= 0, 1, -1)
    agrees = np.sign(scaled) == sign
    share = (agrees * np.array(weights)[:, None, None]).sum(0)
    return (scaled * agrees).sum(0) / np.where(share == 0, 1, share)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.4)])
@pytest.mark.parametrize(
    "method", ["linear", "task-arithmetic", "cat", "ties", "magnitude-prune", "breadcrumbs"]
)  # dare and slerp: below
def test_two_adapters_equal_the_dense_computation(
    tmp_path: Path, base: Base, pair: list[Path], method: str, weights: tuple[float, float]
) -> None:
    flags = ["--method", method]
    if method == "cat":
        weights = (1.0, 1.0)
    else:
        flags += ["--weight", str(weights[0]), "--weight", str(weights[1])]
    if method in ELEMENTWISE:
        flags += ["--density", "0.3", *FULL]
    if method == "breadcrumbs":
        flags += ["--gamma", "0.1"]
    run(base, pair, tmp_path / "out", *flags)
    dense, merged = [changes(path) for path in pair], changes(tmp_path / "out")
    for name in merged:
        wanted = by_hand(method, [part[name] for part in dense], list(weights), 0.3, 0.1)
        np.testing.assert_allclose(merged[name], wanted, rtol=0, atol=2e-6, err_msg=name)
    assert any(np.abs(merged[name]).max() > 0.01 for name in merged)


@pytest.mark.parametrize("options", [{}, {"r": 8, "use_rslora": True}, {"rank_pattern": {"dense": 2}}])
@pytest.mark.parametrize("method", METHODS)
def test_identity_merge(tmp_path: Path, base: Base, method: str, options: dict) -> None:
    path, out = make_adapter(tmp_path / "a", **options), tmp_path / "out"
    flags = ["--density", "1"] if method in ELEMENTWISE else ["--quantile", "0"] if method == "layerwise" else []
    run(base, [path], out, "--method", method, *flags)
    before, after = tuned_weights(path), tuned_weights(out)
    assert all(torch.equal(after[name], before[name]) for name in before)


def joined(
    method: str, changes: list[torch.Tensor], weights: list[float], sparsity: sparse.Sparsity, names: list[str]
) -> torch.Tensor:
    """A method from end to end on dense changes."""
    how = sparse.METHODS[method]
    thin = [how.thin(change.clone(), sparsity, name) for change, name in zip(changes, names, strict=True)]
    return how.join(thin, weights)


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_the_element_by_element_way_is_the_identity_too(method: str) -> None:
    change = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    merged = joined(method, [change], [1.0], sparse.Sparsity(), ["x"])
    assert torch.equal(merged, change)


@pytest.mark.parametrize(("t", "wanted"), [("0", 0), ("1", 1)])
def test_slerp_ends_at_its_adapters(tmp_path: Path, base: Base, pair: list[Path], t: str, wanted: int) -> None:
    run(base, pair, tmp_path / "out", "--method", "slerp", "--t", t)
    before, after = changes(pair[wanted]), changes(tmp_path / "out")
    assert all(np.abs(after[name] - before[name]).max() < 1e-12 for name in before)


def test_slerp_in_between_equals_the_dense_formula(tmp_path: Path, base: Base, pair: list[Path]) -> None:
    run(base, pair, tmp_path / "out", "--method", "slerp", "--t", "0.3")
    first, second, merged = changes(pair[0]), changes(pair[1]), changes(tmp_path / "out")
    for name, found in merged.items():
        one, other = first[name].reshape(-1), second[name].reshape(-1)
        shares = 0.7, 0.3
        if one.any() and other.any():
            angle = np.arccos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
            shares = np.sin(0.7 * angle) / np.sin(angle), np.sin(0.3 * angle) / np.sin(angle)
        wanted = (shares[0] * one + shares[1] * other).reshape(found.shape)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_dare_keeps_by_chance_and_rescales(method: str) -> None:
    change = torch.randn(200, 300, generator=torch.Generator().manual_seed(3))
    sparsity = sparse.Sparsity(density=0.25, seed=5)
    merged = joined(method, [change], [0.5], sparsity, ["layer 0"])
    kept = merged != 0
    assert abs(float(kept.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / change.numel()) ** 0.5
    torch.testing.assert_close(merged[kept], 0.5 * 4 * change[kept], rtol=1e-6, atol=0)
    again = joined(method, [change], [0.5], sparsity, ["layer 0"])
    assert torch.equal(again, merged)
    for other in (sparse.Sparsity(density=0.25, seed=6), sparsity):
        name = "layer 0" if other.seed == 6 else "layer 1"
        unlike = joined(method, [change], [0.5], other, [name])
        assert abs(float(((unlike != 0) == kept).float().mean()) - 0.625) < 0.02  # 0.25² + 0.75²


def test_dare_ties_adds_up_the_winning_sign_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(40, 50, generator=generator) for _ in range(3)]
    sparsity, names, weights = sparse.Sparsity(density=0.5), ["a", "b", "c"], [1.0, 0.5, 2.0]
    dropped = [sparse.dropped(part.clone(), sparsity, name) for part, name in zip(parts, names, strict=True)]
    scaled = np.stack([w * part.double().numpy() for w, part in zip(weights, dropped, strict=True)])
    sign = np.where(scaled.sum(0) >= 0, 1, -1)
    wanted = (scaled * (np.sign(scaled) == sign)).sum(0)
    merged = joined("dare-ties", parts, weights, sparsity, names)
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=0, atol=1e-5)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(-2, 35))
def test_exactly_as_many_stay_and_none_that_is_smaller(values: list[int], count: int) -> None:
    change = torch.tensor(values, dtype=torch.float32)
    whole, blocks = sparse.kept_largest(change, count), sparse._BLOCK_ELEMENTS
    try:
        sparse._BLOCK_ELEMENTS = 4
        mask = sparse.kept_largest(change, count)
    finally:
        sparse._BLOCK_ELEMENTS = blocks
    assert torch.equal(mask, whole)
    assert int(mask.sum()) == min(max(count, 0), len(values))
    if mask.any() and not mask.all():
        assert change[mask].abs().min() >= change[~mask].abs().max()
    assert all(torch.equal(mask, sparse.kept_largest(change, count)) for _ in range(2))


def test_weights_of_single_layers(tmp_path: Path, base: Base, pair: list[Path]) -> None:
    said = ["layers.*=0.5", "layers.1.*=2,0", "*.mlp.*=3,1"]
    flags = [word for pattern in said for word in ("--layer-weight", pattern)]
    run(base, pair, tmp_path / "out", "--method", "task-arithmetic", "--weight", "1", "--weight", "-1", *flags)
    first, second, merged = changes(pair[0]), changes(pair[1]), changes(tmp_path / "out")
    for name, found in merged.items():
        one, other = (3, 1) if ".mlp." in name else (2, 0) if "layers.1." in name else (0.5, 0.5)
        np.testing.assert_allclose(found, one * first[name] - other * second[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("said", ["layers.9.*=1", "layers.0.*", "layers.0.*=x", "*=1,2,3"])
def test_patterns_that_cannot_be_meant_are_refused(tmp_path: Path, base: Base, pair: list[Path], said: str) -> None:
    with pytest.raises(UsageError, match="--layer-weight"):
        run(base, pair, tmp_path / "out", "--method", "task-arithmetic", "--layer-weight", said)


def test_full_rank_is_no_adapter_unless_a_rank_is_named(tmp_path: Path, base: Base, pair: list[Path]) -> None:
    ties = ["--method", "ties", "--density", "0.2"]
    with pytest.raises(UserError, match=r"full rank.*--output hf or sat.*--rank"):
        run(base, pair, tmp_path / "out", *ties)
    assert not (tmp_path / "out").exists()
    run(base, pair, tmp_path / "low", *ties, "--rank", "6")
    run(base, pair, tmp_path / "full", *ties, *FULL)
    low, full = changes(tmp_path / "low"), changes(tmp_path / "full")
    told = {
        row["layer"]: row["lost_by_low_rank"] for row in json.loads((tmp_path / "low/merge.json").read_text())["layers"]
    }
    for name, loss in told.items():
        left, values, right = np.linalg.svd(full[name])
        nearest = (left[:, :6] * values[:6]) @ right[:6]
        best = np.linalg.norm(full[name] - nearest) / np.linalg.norm(full[name])
        found = np.linalg.norm(full[name] - low[name]) / np.linalg.norm(full[name])
        assert loss == pytest.approx(found, abs=1e-5) and best - 1e-6 <= found <= best * 1.001
    assert len(told) == 12
    assert {
        tensor.shape[0] for key, tensor in load_file(tmp_path / "low/adapter_model.safetensors").items() if "_A" in key
    } == {6}


def test_adapters_that_do_not_belong_together_are_refused(tmp_path: Path, base: Base, pair: list[Path]) -> None:
    (pair[1] / "hpe.json").write_text(json.dumps({"scope": "all", "answer_format": "offset"}))
    with pytest.raises(UserError, match="differ in scope"):
        run(base, pair, tmp_path / "out", "--method", "cat")


def test_weights_that_cancel_cannot_be_averaged(tmp_path: Path, base: Base, pair: list[Path]) -> None:
    with pytest.raises(UsageError, match="divides by the sum of the weights"):
        run(base, pair, tmp_path / "out", "--method", "linear", "--weight", "1", "--weight", "-1")


def test_sums_of_ranks_stay_low(tmp_path: Path, base: Base, pair: list[Path]) -> None:
    run(base, pair, tmp_path / "out", "--method", "cat")
    ranks = {name: factor.rank for name, factor in factors.read_adapter(tmp_path / "out").factors.items()}
    assert ranks["layers.0.attention.dense"] == 7
    assert ranks["layers.0.mlp.up_proj"] == 4 and ranks["layers.0.mlp.down_proj"] == 3
