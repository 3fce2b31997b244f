"""Muon beside AdamW in one optimizer."""

import pytest
import torch
from torch import nn

from cogvlm_hpe.train.muon import Muon, is_matrix, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_an_update_has_nearly_equal_singular_values(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    out = orthogonal(matrices)
    values = torch.linalg.svdvals(out)
    assert out.shape == shape and (values > 0.6).all() and (values < 1.3).all()
    # The directions stay: the same left and right factors, only their sizes change.
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ out @ right.mT
    off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-3


def test_only_matrices_inside_the_network_are_muons() -> None:
    assert is_matrix("cogvlm.model.layers.0.mlp.language_mlp.gate_proj.weight", torch.zeros(4, 4))
    assert is_matrix("cogvlm.model.vision.patch_embedding.proj.weight", torch.zeros(4, 3, 2, 2))
    for name, shape in (
        ("cogvlm.model.embed_tokens.weight", (4, 4)),
        ("cogvlm.model.vision.patch_embedding.position_embedding.weight", (4, 4)),
        ("cogvlm.model.vision.boi", (1, 1, 4)),
        ("cogvlm.model.vision.patch_embedding.cls_embedding", (1, 4)),
        ("cogvlm.lm_head.weight", (4, 4)),
        ("dense.tower.weight", (4, 4)),
        ("cogvlm.model.norm.weight", (4,)),
    ):
        assert not is_matrix(name, torch.zeros(shape)), name


def test_the_rest_is_updated_as_by_adamw() -> None:
    start = torch.randn(5, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    pair = (Muon({"norm.weight": ours}, **settings), torch.optim.AdamW([theirs], **settings))
    for _ in range(5):
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = parameter.detach() ** 3 + 1
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_linear_map_is_learned() -> None:
    torch.manual_seed(0)
    truth, layer = torch.randn(8, 12), nn.Linear(12, 8, bias=False)
    optimizer = Muon({"weight": layer.weight}, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    x = torch.randn(256, 12)
    losses = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        loss = (layer(x) - x @ truth.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
