"""Equal to what peft's own add_weighted_adapter makes of the same adapters, where it computes on whole changes.

Its `_svd` types form each change, merge those and factorise the result, here at full rank. Its types without `_svd`
add up A and B apart, and its `dare_ties_svd` divides by the number that agree; docs/merging.md says so.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from merging import choose, make_adapter, make_base, make_tower

from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.sparse import Sparsity, dropped

DENSITY = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of differing rank, scale and layers."""
    out = tmp_path_factory.mktemp("peft")
    make_base(out / "base")
    make_adapter(out / "a")
    make_adapter(out / "b", seed=2, r=3, target_modules=["query_key_value", "down_proj"])
    return out


def theirs(folder: Path, kind: str, weights: list[float]) -> dict[str, torch.Tensor]:
    """Module → the change of the adapter that peft makes of both, in float64."""
    model = peft.PeftModel.from_pretrained(make_tower().double(), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    model = model.double()
    more = {} if kind == "cat" else {"svd_rank": 24, "density": DENSITY}
    model.base_model.add_weighted_adapter(["a", "b"], weights, "both", combination_type=kind, **more)
    layers = dict(model.base_model.model.named_modules())
    return {
        name: layer.get_delta_weight("both")
        for name, layer in layers.items()
        if isinstance(layer, peft.tuners.lora.Linear) and "both" in layer.lora_A
    }


def ours(folder: Path, method: str, weights: list[float], density: float | None) -> dict[str, torch.Tensor]:
    adapters = [folder / "a", folder / "b"]
    settings = {"method": method, "weight": weights, "density": density, "rank": 24 if density else None}
    [(_, merged)] = choose(Base(folder / "base"), adapters, **settings)
    return {layer: merged.changes.change(layer) for layer in merged.changes.layers()}


@pytest.mark.parametrize(
    ("method", "kind", "weights", "density"),
    [
        ("task-arithmetic", "cat", [0.7, 0.4], None),
        ("task-arithmetic", "svd", [0.7, 0.4], None),
        ("magnitude-prune", "magnitude_prune_svd", [0.7, 0.4], DENSITY),
        ("ties", "ties_svd", [1.0, 1.0], DENSITY),  # with unequal weights they elect and divide otherwise
        ("dare-linear", "dare_linear_svd", [0.7, 0.4], DENSITY),
    ],
)
def test_equals_peft(
    folder: Path, method: str, kind: str, weights: list[float], density: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", our_chances(ours(folder, method, weights, density)))
    wanted, found = theirs(folder, kind, weights), ours(folder, method, weights, density)
    assert found.keys() == wanted.keys() and len(found) == 12
    for layer, change in found.items():
        assert wanted[layer].abs().max() > 0.01
        torch.testing.assert_close(change.double(), wanted[layer], rtol=0, atol=1e-5, msg=layer)


def our_chances(layers: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Drops what we drop: peft asks layer by layer in the model's order, adapter by adapter, as they have the layer."""
    held = {"a": ("query_key_value", "dense", "up_proj"), "b": ("query_key_value", "down_proj")}
    order = [name for name, _ in make_tower().named_modules() if name in layers]
    asked = itertools.chain.from_iterable(
        [f"{layer} {number}" for number, kinds in enumerate(held.values()) if layer.endswith(kinds)] for layer in order
    )
    return lambda tensor, density, rescale: dropped(tensor.clone(), Sparsity(density), next(asked))
