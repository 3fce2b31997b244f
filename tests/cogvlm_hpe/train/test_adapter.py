"""What trains: counted, named, and with a gradient wherever the factors are put."""

import re

import pytest
import torch
from tiny_model import small_config
from torch import nn

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.load import empty_model
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train.adapter import TARGETS, add_lora, count_trainable, trainable, trainable_table, trainable_text
from launcher.errors import UsageError

RANK = 10
WIDTH, INNER, LAYERS = 4096, 11008, 32
VIT_WIDTH, VIT_INNER, VIT_LAYERS = 1792, 15360, 63
# Of each group: transformer layers, and (in, out) of the linear layers in one of them.
ATTENTION, MLP = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH)], [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
FULL_SIZE = {
    "language.attention": (LAYERS, ATTENTION),
    "language.mlp": (LAYERS, MLP),
    "vision.attention": (LAYERS, ATTENTION),
    "vision.mlp": (LAYERS, MLP),
    "vit.attention": (VIT_LAYERS, [(VIT_WIDTH, 3 * VIT_WIDTH), (VIT_WIDTH, VIT_WIDTH)]),
    "vit.mlp": (VIT_LAYERS, [(VIT_WIDTH, VIT_INNER), (VIT_INNER, VIT_WIDTH)]),
    "glue": (1, [(VIT_WIDTH, WIDTH), *MLP]),
}
PREFIX_TOKENS = 25 + 3  # of small_config: image tokens, bos, boi, eoi


def lora(*targets: str, scope: str = "all", rank: int = RANK) -> AdapterConfig:
    return AdapterConfig(rank=rank, alpha=2 * rank, targets=list(targets), scope=scope)  # type: ignore[arg-type]


def full_size(*targets: str) -> CogVLMForCausalLM:
    model = empty_model(CogVLMConfig(), torch.bfloat16)
    add_lora(model, lora(*targets), "unused")
    return model


@pytest.fixture
def model() -> CogVLMForCausalLM:
    torch.manual_seed(0)
    return CogVLMForCausalLM(small_config())


def loss_of(model: CogVLMForCausalLM) -> torch.Tensor:
    """Two questions on one image."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 41, (2, 6), generator=generator)
    labels = torch.where(torch.arange(6) < 3, -100, ids)
    pixels = torch.randn(1, 3, 70, 70, generator=generator)
    index = torch.zeros(2, dtype=torch.long)
    return model(pixel_values=pixels, image_index=index, branch_input_ids=ids, branch_labels=labels).loss


@pytest.mark.parametrize("group", TARGETS)
def test_counts_of_cogvlm_17b_are_those_of_the_formula(group: str) -> None:
    layers, sides = FULL_SIZE[group]
    [row] = trainable_table(full_size(group))
    parameters = layers * sum(RANK * (n_in + n_out) for n_in, n_out in sides)
    assert (row.group, row.layers, row.tensors, row.parameters) == (group, layers, 2 * layers * len(sides), parameters)


def test_the_official_placement_is_known_and_ours_has_fewer_factors() -> None:
    """SAT has three pairs for a fused q, k, v, of (in, r) and (r, out / 3); peft has one, whose A they share."""
    model = full_size("language.attention", "vit.attention")
    ours = sum(row.parameters for row in trainable_table(model))
    official = 0
    for name, module in model.named_modules():
        if re.search(r"query_key_value$|attention\.dense$|attn\.\w+_dense$", name) and hasattr(module, "base_layer"):
            parts = 3 if name.endswith("query_key_value") else 1
            official += RANK * (parts * module.in_features + module.out_features)
    assert official == 19_517_440
    assert ours == official - LAYERS * 2 * RANK * WIDTH - VIT_LAYERS * 2 * RANK * VIT_WIDTH == 14_638_080


def test_every_parameter_of_a_whole_model_has_a_group() -> None:
    table = trainable_table(empty_model(CogVLMConfig(), torch.bfloat16))
    rows = {row.group: row for row in table}
    assert len(rows) == len(table) and "other" not in rows and rows.keys() > TARGETS.keys()
    assert sum(row.parameters for row in table) == 17_639_685_376
    for group, (layers, sides) in FULL_SIZE.items():
        weights = sum(n_in * n_out for n_in, n_out in sides)
        biases = sum(n_out for _, n_out in sides) if group.startswith("vit") else 0
        assert (rows[group].layers, rows[group].parameters) == (layers, layers * (weights + biases))


def test_the_text_says_groups_counts_and_share() -> None:
    lines = trainable_text(full_size("language.attention", "glue")).splitlines()
    assert lines[0].split() == ["trains", "layers", "tensors", "parameters", "dtype"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["language.attention", "32", "128", "7,864,320"],
        ["glue", "1", "8", "512,000"],
    ]
    assert lines[3] == "8,376,320 of 17,648,061,696 parameters train (0.047%)"


def test_a_config_is_counted_without_weights() -> None:
    config = RunConfig("unused", ModelConfig("tiny"), ShardsConfig([SetConfig("unused")]), lora("language.mlp"))
    assert "language.mlp" in count_trainable(config)
    with pytest.raises(UsageError, match="vit.heads"):
        count_trainable(RunConfig("unused", config.model, config.shards, lora("vit.heads")))


def test_unknown_groups_and_groups_without_layers_are_errors(model: CogVLMForCausalLM) -> None:
    with pytest.raises(UsageError, match=r"'language': not one of language\.attention"):
        add_lora(model, lora("language"), "unused")
    model.model.vision.transformer.layers = nn.ModuleList()
    with pytest.raises(UsageError, match=r"'vit\.mlp': this model has no such layer"):
        add_lora(model, lora("language.mlp", "vit.mlp"), "unused")


@pytest.mark.parametrize("group", TARGETS)
def test_each_group_has_a_gradient_and_recomputing_changes_nothing(model: CogVLMForCausalLM, group: str) -> None:
    add_lora(model, lora(group, rank=2), "unused")
    model.train()
    found = {}
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = loss_of(model)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
        found[recompute] = loss.item(), gradients
        model.zero_grad()
    (loss, gradients), (loss_again, gradients_again) = found[False], found[True]
    assert loss_again == pytest.approx(loss, abs=1e-6)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    # Nobody reads what the last layer makes of image tokens after their keys and values.
    unread = re.compile(r"layers\.1\.(self_attn\.vision_expert_dense|mlp\.vision_mlp)")
    for name in (n for n in trainable(model) if "lora_B" in n):
        assert (name in gradients and bool(gradients[name].any())) != bool(unread.search(name)), name


def saved_shapes(model: CogVLMForCausalLM) -> list[tuple[int, ...]]:
    """Shapes of all that the forward pass keeps for the backward pass."""
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model)
    return shapes


@pytest.mark.parametrize("recompute", [False, True])
def test_scope_text_keeps_nothing_of_the_prefix(model: CogVLMForCausalLM, recompute: bool) -> None:
    """Keys and values excepted: the questions' own attention needs them."""
    head_width = 8

    def of_prefix() -> list[tuple[int, ...]]:
        lengths = set(range(PREFIX_TOKENS - 3, PREFIX_TOKENS + 1))
        return [shape for shape in saved_shapes(model) if lengths & set(shape) and shape[-1] != head_width]

    add_lora(model, lora("language.attention", "language.mlp", rank=2), "unused")
    model.train()
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert of_prefix()
    model.adapter_scope = "text"
    assert not of_prefix()


def test_recomputing_keeps_nothing_of_the_inside_of_a_vision_layer(model: CogVLMForCausalLM) -> None:
    inner = small_config().vision_config["intermediate_size"]
    add_lora(model, lora("vit.attention", rank=2), "unused")
    model.train()
    assert any(inner in shape for shape in saved_shapes(model))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert not any(inner in shape for shape in saved_shapes(model))
