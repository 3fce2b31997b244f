"""Makes mergekit.safetensors beside it: what mergekit 0.1.5 itself makes of two adapters in float64.

pip install --no-deps --target DIR mergekit==0.1.5 immutables
PYTHONPATH=DIR:. python tests/data/merge/make.py

The adapters' changes are added to the base densely, as mergekit wants its models. DARE's chances are replaced by this
project's, and mergekit's rescaling is off: it keeps the L1 norm of each change, this project divides by the density.
"""

import tempfile
from pathlib import Path

import mergekit.sparsify
import torch
import yaml
from mergekit.scripts import merge_raw_pytorch
from safetensors.torch import load_file, save_file

from cogvlm_hpe.merge.sparse import Sparsity, dropped

SHAPES = {"layers.0.up": (40, 24), "layers.1.down": (24, 36)}
DENSITY, GAMMA, WEIGHTS = 0.4, 0.1, (0.8, 0.5)
METHODS = ("linear", "task_arithmetic", "ties", "breadcrumbs", "dare_linear", "dare_ties")
OUT = Path(__file__).with_name("mergekit.safetensors")


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    out = {}
    for layer, (n_out, n_in) in SHAPES.items():
        out[f"base.{layer}"] = torch.randn(n_out, n_in, generator=generator)
        for number, rank in enumerate((3, 5)):
            out[f"{number}.{layer}.A"] = torch.randn(rank, n_in, generator=generator)
            out[f"{number}.{layer}.B"] = torch.randn(n_out, rank, generator=generator) * 0.1
    return out


def our_chances(tensor: torch.Tensor, density: float, rescale_norm: object = None) -> torch.Tensor:
    layer = next(layer for layer, shape in SHAPES.items() if shape == tuple(tensor.shape))
    number = calls[layer] = calls.get(layer, -1) + 1
    mask = dropped(torch.ones(tensor.shape), Sparsity(DENSITY), f"{layer} {number}") != 0
    return tensor * mask


def merged(method: str, models: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}.safetensors" for name in models}
        for name, tensors in models.items():
            save_file(tensors, paths[name])
        said = {"density": DENSITY, "gamma": GAMMA} if method not in ("linear", "task_arithmetic") else {}
        if method != "breadcrumbs":
            said.pop("gamma", None)
        listed = [{"model": paths[str(n)], "parameters": {"weight": weight} | said} for n, weight in enumerate(WEIGHTS)]
        config = {"merge_method": method, "dtype": "float64", "out_dtype": "float64", "models": listed}
        if method != "linear":
            config |= {"base_model": paths["base"]}
        if method.startswith("dare"):
            config |= {"parameters": {"rescale": False}}
        Path(f"{folder}/config.yaml").write_text(yaml.safe_dump(config))
        merge_raw_pytorch.main([f"{folder}/config.yaml", f"{folder}/out"], standalone_mode=False)
        [file] = Path(folder, "out").glob("*.safetensors")
        return load_file(file)


mergekit.sparsify.bernoulli = our_chances
given = inputs()
models = {name: {layer: given[f"base.{layer}"].double() for layer in SHAPES} for name in ("base", "0", "1")}
for number in ("0", "1"):
    for layer in SHAPES:
        models[number][layer] += given[f"{number}.{layer}.B"].double() @ given[f"{number}.{layer}.A"].double()
for method in METHODS:
    calls: dict[str, int] = {}
    for layer, tensor in merged(method, models).items():
        given[f"{method}.{layer}"] = tensor.float()
save_file(given, OUT)
