"""Dense targets and guided attention."""

import pytest
import torch
from tiny_model import small_config

from cogvlm_hpe.config import AuxiliaryConfig
from cogvlm_hpe.dialogue import SECTORS, TILTS, facing, format_box
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train.auxiliary import KINDS, DenseHeads, dense_targets, guidance_loss
from cogvlm_hpe.train.module import TrainedModule
from launcher.errors import UsageError
from shards.pose import rotation_from_pose
from shards.record import Head, Image, Object, Record

ROTATION = tuple(rotation_from_pose(30.0, 10.0, -5.0).reshape(9).tolist())
RECORD = Record(
    Image(80, 80, "test", "1", "1"),
    [Head((0.0, 0.0, 40.0, 40.0), ROTATION)],
    [Object("red cube", (60.0, 60.0, 80.0, 80.0)), Object("head", (0.0, 0.0, 40.0, 40.0))],
)


def test_targets_name_what_covers_each_patch() -> None:
    targets = dense_targets([RECORD], side=8)
    kinds = targets.kind[0].view(8, 8)
    assert (kinds[:4, :4] == KINDS.index("head")).all()
    assert (kinds[6:, 6:] == KINDS.index("cube")).all()
    assert (kinds == 0).sum() == 64 - 16 - 4
    assert torch.allclose(targets.axes[0, 0], torch.tensor(ROTATION, dtype=torch.float))
    assert targets.axes[0, 63].isnan().all()
    assert torch.allclose(targets.box[0, 0], torch.tensor([-0.0625, -0.0625, 0.4375, 0.4375]))


def test_a_head_without_a_rotation_is_a_head_without_axes() -> None:
    bare = Record(RECORD.image, [Head((0.0, 0.0, 40.0, 40.0), None)])
    targets = dense_targets([bare], side=8)
    assert targets.kind[0, 0] == KINDS.index("head") and targets.box[0, 0].isfinite().all()
    assert targets.axes.isnan().all()


def test_unknown_targets_give_no_gradient_and_no_nan() -> None:
    heads = DenseHeads(4, 6)
    patches, tokens = torch.randn(2, 64, 4, requires_grad=True), torch.randn(2, 64, 6, requires_grad=True)
    heads(patches, tokens, dense_targets([RECORD, None], side=8)).backward()
    assert patches.grad.isfinite().all() and tokens.grad.isfinite().all()
    assert patches.grad[0].abs().sum() > 0
    assert patches.grad[1].abs().sum() == 0  # an image without a record has nothing to say


def test_guidance_falls_as_attention_moves_into_the_box() -> None:
    labels = torch.tensor([[-100, 5, 2]])
    boxes = torch.tensor([[0.0, 0.0, 0.25, 0.25]])
    scores = torch.zeros(1, 2, 3, 64 + 3)
    even = guidance_loss(scores, labels, boxes, side=8)
    assert even.item() == pytest.approx(torch.log(torch.tensor(67 / 4)).item(), rel=1e-5)
    scores[..., 2] = scores[..., 2 + 9] = 5.0  # patches (0, 0) and (1, 1) of the box
    assert guidance_loss(scores, labels, boxes, side=8) < 0.5 * even
    scores[..., 2 + 63] = 9.0
    assert guidance_loss(scores, labels, boxes, side=8) > even


def test_a_layer_that_the_model_lacks_cannot_be_guided() -> None:
    with torch.device("meta"):
        model = CogVLMForCausalLM(small_config())
    with pytest.raises(UsageError, match="guided_layer 7: the model's decoder layers are 0 to 1"):
        TrainedModule(model, AuxiliaryConfig(guided_layer=7))
    TrainedModule(model, AuxiliaryConfig(dense=1.0, guided_layer=7, tower_only=True))


def test_dense_targets_spell_the_box_and_the_direction_as_the_answers_do() -> None:
    targets = dense_targets([RECORD], side=8)
    digits = format_box(RECORD.objects[0].bbox, 80, 80).strip("[]").split(",")
    assert targets.digits[0, 63].tolist() == [int(d[0]) for d in digits] + [int(d[1]) for d in digits]
    head = RECORD.heads[0]
    sector, tilt = targets.facing[0, 0].tolist()
    said = facing((-head.matrix[:, 2]).tolist())
    assert said == SECTORS[sector] + ("" if TILTS[tilt] == "level" else f" {TILTS[tilt]}")
    assert (targets.facing[0, 63] == -100).all() and (targets.digits[0, 7] == -100).all()


def test_a_mirrored_record_has_targets_too() -> None:
    targets = dense_targets([RECORD.mirrored()], side=8)
    assert targets.axes.dtype == torch.float
    assert targets.axes[0, 7].isfinite().all() and targets.axes[0, 0].isnan().all()
