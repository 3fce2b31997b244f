"""What trains: counted, named, and with a gradient wherever the factors are put."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_model import small_config
from torch import nn

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig
from cogvlm_hpe.merge.factors import Factors, read_adapter
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.folders import read_notes
from cogvlm_hpe.model.load import empty_model, load_base, put_adapter
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train.adapter import (
    TARGETS,
    add_lora,
    count_trainable,
    group_of,
    read_input,
    stack_on,
    start_from,
    trainable,
    trainable_table,
    trainable_text,
)
from cogvlm_hpe.train.checkpoint import Describe, Writer, newest, read
from cogvlm_hpe.train.module import MODEL_PREFIX
from launcher.errors import UsageError, UserError

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


def logits_of(model: CogVLMForCausalLM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids, pixels = torch.randint(4, 41, (2, 6), generator=generator), torch.randn(1, 3, 70, 70, generator=generator)
    with torch.no_grad():
        return model.eval()(
            pixel_values=pixels, image_index=torch.zeros(2, dtype=torch.long), branch_input_ids=ids
        ).logits


def moved(model: CogVLMForCausalLM, seed: int) -> dict[str, torch.Tensor]:
    """Trained parameters, after something was learned."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def saved(folder: Path, model: CogVLMForCausalLM, lora_config: LoraConfig, before: Factors, seed: int) -> Path:
    describe = Describe({"scope": "all"}, lora_config, None, None, before)
    weights = {MODEL_PREFIX + name: tensor for name, tensor in moved(model, seed).items()}
    Writer(folder, describe).save(1, weights, {}, {})
    return newest(folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_stacked_is_saved_as_one_adapter_and_parted_again(tmp_path: Path, rslora: bool) -> None:
    """Of other layers, ranks and scales; judged, merged and resumed like any other."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    CogVLMForCausalLM(small_config()).save_pretrained(base)
    first, before = load_base(base), lora("language.attention", "glue", rank=3)
    first_folder = saved(tmp_path / "1", first, add_lora(first, before, str(base)), {}, 1)
    given = read_adapter(first_folder)

    second = load_base(base)
    config = dataclasses.replace(lora("language.attention", "vision.mlp", rank=2), rslora=rslora, alpha=3.0)
    lora_config = add_lora(second, config, str(base))
    stack_on(second, given, base)
    assert torch.allclose(logits_of(second), logits_of(first), atol=1e-5), "it begins where the first one ended"
    assert not any(".before." in name for name in trainable(second))
    folder = saved(tmp_path / "2", second, lora_config, given.factors, 2)

    whole = read_adapter(folder).factors
    ranks = {group_of(f"{layer}.weight"): factor.rank for layer, factor in whole.items()}
    assert ranks == {"language.attention": 5, "glue": 3, "vision.mlp": 2}
    assert torch.allclose(logits_of(put(base, folder)), logits_of(second), atol=1e-4)
    again = read(folder, given.factors).weights
    assert again.keys() == {MODEL_PREFIX + name for name in trainable(second)}
    assert all(again[MODEL_PREFIX + name].equal(tensor) for name, tensor in trainable(second).items())
    with pytest.raises(UserError, match="not as it was when this run was started"):
        read(folder, {name: dataclasses.replace(f, a=f.a + 1) for name, f in given.factors.items()})


def put(base: Path, folder: Path) -> CogVLMForCausalLM:
    model = load_base(base)
    put_adapter(model, folder, base, read_notes(folder))
    return model


def test_a_stage_takes_over_only_what_fits(tmp_path: Path, model: CogVLMForCausalLM) -> None:
    folder = saved(tmp_path, model, add_lora(model, lora("language.mlp", rank=2), "unused"), {}, 1)
    config = dataclasses.replace(lora("language.mlp", rank=2), init=str(folder))
    given = read_input(config, "some fingerprint")
    for other, error, said in (
        (lora("language.mlp", rank=3), UsageError, "has rank 2, here it is 3; .* adapter.stack"),
        (lora("language.attention", rank=2), UserError, "which adapter.targets leaves out"),
    ):
        fresh = CogVLMForCausalLM(small_config())
        add_lora(fresh, other, "unused")
        with pytest.raises(error, match=said):
            start_from(fresh, given)
    with pytest.raises(UsageError, match="its scope is all, this config's text"):
        read_input(dataclasses.replace(config, scope="text"), "")
    (folder / "hpe.json").write_text('{"scope": "all", "base_fingerprint": "abc"}')
    with pytest.raises(UserError, match="made on another base"):
        read_input(config, "abd")
    with pytest.raises(UserError, match="no adapter there"):
        read_input(dataclasses.replace(config, init=str(tmp_path)), "")


def test_what_was_scaled_by_a_merge_goes_on_as_it_is(tmp_path: Path, model: CogVLMForCausalLM) -> None:
    folder = saved(tmp_path, model, add_lora(model, lora("language.mlp", rank=2), "unused"), {}, 1)
    given = read_adapter(folder)
    scaled = {name: dataclasses.replace(factor, scale=0.3 * factor.scale) for name, factor in given.factors.items()}
    fresh = CogVLMForCausalLM(small_config())
    add_lora(fresh, lora("language.mlp", rank=2), "unused")
    start_from(fresh, dataclasses.replace(given, factors=scaled))
    for name, factor in scaled.items():
        change = fresh.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(change, factor.scale * factor.b @ factor.a, atol=1e-6) and change.any()


def test_layers_that_a_merge_dropped_start_afresh(tmp_path: Path, model: CogVLMForCausalLM) -> None:
    folder = saved(tmp_path, model, add_lora(model, lora("language.attention", rank=2), "unused"), {}, 1)
    fresh = CogVLMForCausalLM(small_config())
    add_lora(fresh, lora("language.attention", "language.mlp", rank=2), "unused")
    start_from(fresh, read_adapter(folder))
    ups = {name: bool(p.any()) for name, p in trainable(fresh).items() if "lora_B" in name}
    assert all(learned == ("self_attn" in name) for name, learned in ups.items())
