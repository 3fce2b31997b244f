"""The linear read-out of pose."""

import numpy as np
import torch

from cogvlm_hpe.paper.probe import _sample, fit, read_out
from shards.pose import geodesic_deg, rotation_from_pose


def test_what_is_a_linear_function_of_the_rotation_is_read_exactly_from_unseen_heads() -> None:
    draw = np.random.default_rng(1)
    rotations = rotation_from_pose(*draw.uniform(-90, 90, (3, 400)))
    features = rotations.reshape(-1, 9) @ draw.normal(size=(9, 30)) * 10 + draw.normal(size=30)
    weights = fit(features[:300], rotations[:300])
    read = read_out(features[300:], weights)
    assert np.allclose(np.linalg.det(read), 1)
    assert geodesic_deg(read, rotations[300:]).mean() < 1
    assert geodesic_deg(read_out(features[300:][::-1], weights), rotations[300:]).mean() > 40


def test_tokens_are_read_where_the_box_is() -> None:
    side = 10
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    tokens = torch.stack([x.flatten(), y.flatten()], dim=-1)[None]
    box = torch.tensor([[0.2, 0.3, 0.8, 0.6]])
    read = _sample(tokens, box).reshape(2, 3, 3)
    assert torch.allclose(read[0], torch.tensor([0.3, 0.5, 0.7]).expand(3, 3), atol=1e-5)
    assert torch.allclose(read[1], torch.tensor([0.35, 0.45, 0.55])[:, None].expand(3, 3), atol=1e-5)
