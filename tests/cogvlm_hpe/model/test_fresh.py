"""Weights to start from."""

import torch

from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.fresh import cosines, fresh_model, waves
from cogvlm_hpe.model.weights import read_config


def test_every_place_of_the_grid_has_its_own_wave_and_neighbours_are_alike() -> None:
    places = torch.nn.functional.normalize(waves(10, 128), dim=1)
    alike = places @ places.T
    assert (alike - 2 * torch.eye(100)).max() < 0.99
    row = alike[0, :10]  # from the corner along the first row: the nearer, the more alike
    assert (row[:4].diff() < 0).all() and row[1] > 0.8 > row[3]
    assert torch.allclose(waves(3, 10)[:, 8:], torch.zeros(9, 2))


def test_a_seed_gives_the_same_fresh_model_with_quiet_blocks() -> None:
    config = read_config(resolve_base("tiny"))
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(fresh_model(config))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    layer = models[0].model.vision.transformer.layers[0]
    assert (layer.input_layernorm.weight < 1).all() and (layer.post_attention_layernorm.weight < 1).all()


def test_kernels_of_patches_are_orthogonal_and_low_ones_first() -> None:
    kernels = cosines(14, 128)
    assert kernels.shape == (128, 3, 14, 14)
    flat = torch.nn.functional.normalize(kernels.flatten(1), dim=1)
    assert (flat @ flat.T - torch.eye(128)).abs().max() < 1e-5
    assert kernels[0].std(dim=(1, 2)).max() < 1e-6  # the first one is the mean brightness
    assert (kernels[64:].sum(dim=1).abs() < 1e-6).all()  # the others see no brightness
