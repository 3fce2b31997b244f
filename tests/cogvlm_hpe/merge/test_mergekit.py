"""Equal to what mergekit 0.1.5 made of the same tensors; tests/data/merge/make.py says how."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvlm_hpe.merge import arithmetic
from cogvlm_hpe.merge.factors import Factor
from cogvlm_hpe.merge.methods import Elementwise, LowRank
from cogvlm_hpe.merge.sparse import Sparsity

GIVEN = load_file(Path(__file__).parents[2] / "data" / "merge" / "mergekit.safetensors")
LAYERS = ["layers.0.up", "layers.1.down"]
DENSITY, GAMMA, WEIGHTS = 0.4, 0.1, (0.8, 0.5)
PARTS = [{name: Factor(GIVEN[f"{n}.{name}.A"], GIVEN[f"{n}.{name}.B"], 1.0) for name in LAYERS} for n in (0, 1)]
LAYER_WEIGHTS = [dict.fromkeys(LAYERS, weight) for weight in WEIGHTS]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "breadcrumbs", "dare_linear", "dare_ties"])
def test_equals_mergekit(method: str, layer: str) -> None:
    if method == "linear":
        # mergekit averages the tuned models; the base drops out of that average.
        changes = LowRank(arithmetic.average(PARTS, LAYER_WEIGHTS))
    elif method == "task_arithmetic":
        changes = LowRank(arithmetic.weighted_sum(PARTS, LAYER_WEIGHTS))
    else:
        sparsity = Sparsity(DENSITY, GAMMA)
        changes = Elementwise(PARTS, LAYER_WEIGHTS, method.replace("_", "-"), sparsity)
    ours = changes.change(layer) * (DENSITY if method.startswith("dare") else 1.0)  # mergekit did not rescale there
    theirs = GIVEN[f"{method}.{layer}"] - GIVEN[f"base.{layer}"]
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
