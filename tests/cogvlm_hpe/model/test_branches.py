"""Questions that share their image's prefix give what separate sequences give."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from small_model import images, small_model

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.layout import IGNORE
from cogvlm_hpe.model.modeling import CogVLMForCausalLM

ROWS = [(0, [5, 6, 7], [8, 9]), (1, [5, 6], [10, 11, 12, 13]), (1, [7, 7, 7, 6], [9]), (0, [6], [14, 15, 16])]


@pytest.fixture
def model() -> CogVLMForCausalLM:
    return small_model()


def call(model: CogVLMForCausalLM, rows: list, pixels: torch.Tensor) -> torch.Tensor:
    length = max(len(query) + len(answer) + 1 for _, query, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, (_, query, answer) in enumerate(rows):
        text = [*query, *answer, 2]
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
        labels[row, len(query) : len(text)] = torch.tensor(text[len(query) :])
    index = torch.tensor([image for image, _, _ in rows])
    return model(
        pixel_values=pixels,
        image_index=index,
        branch_input_ids=ids,
        branch_attention_mask=mask,
        branch_labels=labels,
    ).loss


def gradients(model: CogVLMForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prefix_equals_separate_sequences(model: CogVLMForCausalLM, recompute: bool) -> None:
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    together = call(model, ROWS, images())
    together.backward()
    shared = gradients(model)
    apart = sum(call(model, [(0, query, answer)], images()[[i]]) for i, query, answer in ROWS) / len(ROWS)
    apart.backward()
    separate = gradients(model)
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    assert shared.keys() == separate.keys()
    for name, gradient in shared.items():
        torch.testing.assert_close(gradient, separate[name], rtol=1e-4, atol=1e-6, msg=name)


def test_padding_changes_nothing_with_or_without_a_mask(model: CogVLMForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    given = {"pixel_values": images()[:1], "image_index": torch.tensor([0, 0]), "branch_input_ids": ids}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    masked = model(**given, branch_attention_mask=mask).logits
    torch.testing.assert_close(masked[mask == 1], model(**given).logits[mask == 1])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_never_waits_for_the_device(recompute: bool) -> None:
    """On the meta device any read of a device value raises."""
    model = small_model().to("meta")
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.tensor([[5, 6, 7, 2], [5, 6, 2, 0], [4, 4, 4, 2]])
    output = model(
        pixel_values=images().to("meta"),
        image_index=torch.tensor([1, 0, 1]),
        branch_input_ids=ids,
        branch_attention_mask=(ids != 0).long(),
        branch_labels=torch.where(torch.arange(4) < 2, IGNORE, ids).masked_fill(ids == 0, IGNORE),
    )
    output.loss.backward()
    assert output.logits.shape == (5, 40)
    assert all(p.grad is not None for n, p in model.named_parameters() if "layers.0" in n)


def test_recomputing_also_covers_the_vision_tower(model: CogVLMForCausalLM) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.model.vision.transformer.layers[0].attention.register_forward_hook(count)
    model.activation_checkpointing_enable({"use_reentrant": False})
    call(model, ROWS, images()).backward()
    assert calls == 2


def test_every_answer_weighs_the_same_whatever_its_length(model: CogVLMForCausalLM) -> None:
    alone = [call(model, [(0, query, answer)], images()[[i]]).item() for i, query, answer in ROWS]
    assert call(model, ROWS, images()).item() == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_batch_of_answers_equals_single_runs(model: CogVLMForCausalLM) -> None:
    pixels = images()
    together = model.answer(pixels, [i for i, _, _ in ROWS], [query for _, query, _ in ROWS], 6)
    alone = [model.answer(pixels[[i]], [0], [query], 6)[0] for i, query, _ in ROWS]
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 1


def test_answer_is_what_repeated_calls_would_choose(model: CogVLMForCausalLM) -> None:
    text = [5, 6, 7]
    for _ in range(5):
        ids = torch.tensor([text])
        logits = model(pixel_values=images()[[0]], image_index=torch.tensor([0]), branch_input_ids=ids).logits
        text.append(int(logits[0, -1].argmax()))
    expected = text[3:] if 2 not in text[3:] else text[3 : text.index(2, 3)]
    assert model.answer(images()[[0]], [0], [[5, 6, 7]], 5) == [expected]


def kept_of_prefix(model: CogVLMForCausalLM, pixels: torch.Tensor) -> int:
    """Activations of image prefixes (images, tokens, …) that a step keeps for its backward pass."""
    shape, kept = (len(pixels), model.config.image_tokens + 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[:2] == shape), lambda _: None):
        call(model, ROWS, pixels)
    return sum(kept)


def test_scope_text_leaves_the_prefix_to_the_base(model: CogVLMForCausalLM) -> None:
    pixels = images()
    base = model.model.encode_prefix(pixels, adapted=True).layers[-1][0].detach()
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=r".*(language_expert_dense|language_mlp\.up_proj)", init_lora_weights=False),
        model,
    )
    adapted = model.model.encode_prefix(pixels, adapted=True).layers[-1][0]
    assert kept_of_prefix(model, pixels) > 0
    model.adapter_scope = "text"
    assert kept_of_prefix(model, pixels) == 0
    kept = model.model.encode_prefix(pixels, adapted=False).layers[-1][0]
    assert torch.equal(kept, base)
    assert not torch.allclose(adapted, base)
    call(model, ROWS, pixels).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and "lora" in name}
    assert with_gradient and not any("vision" in name for name in with_gradient)


def test_a_batch_without_answers_has_a_graph_and_no_loss(model: CogVLMForCausalLM) -> None:
    blank = torch.tensor([[2]])
    output = model(
        pixel_values=images()[[0]],
        image_index=torch.tensor([0]),
        branch_input_ids=blank,
        branch_labels=torch.full_like(blank, IGNORE),
    )
    output.loss.backward()
    assert output.loss.item() == 0.0


def test_wrong_shapes_are_told_before_any_compute(model: CogVLMForCausalLM) -> None:
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="image_index"):
        model(pixel_values=images(), image_index=torch.tensor([0, 1]), branch_input_ids=ids)
    with pytest.raises(ValueError, match="image_index 0..2"):
        model(pixel_values=images(), image_index=torch.tensor([0, 2]), branch_input_ids=ids.expand(2, -1))
    with pytest.raises(ValueError, match="pixel_values"):
        model(pixel_values=images()[..., 1:], image_index=torch.tensor([0]), branch_input_ids=ids)
    for labels, mask in (([[5, 6]], [[1, 1]]), ([[IGNORE, 6]], [[1, 0]])):
        with pytest.raises(ValueError, match="branch_labels: must be -100 on padding and on the first"):
            model(
                pixel_values=images(), image_index=torch.tensor([0]), branch_input_ids=ids,
                branch_attention_mask=torch.tensor(mask), branch_labels=torch.tensor(labels),
            )  # fmt: skip
    with pytest.raises(ValueError, match="branch_attention_mask"):
        padded_left = torch.tensor([[0, 1]])
        one = torch.tensor([0])
        model(pixel_values=images(), image_index=one, branch_input_ids=ids, branch_attention_mask=padded_left)
    with pytest.raises(ValueError, match="image slots"):
        model(input_ids=ids, token_type_ids=torch.tensor([[0, 1]]), pixel_values=images())
    with pytest.raises(ValueError, match=r"labels \(1, 1\): must be as input_ids \(1, 2\)"):
        model(input_ids=ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="uint8: must be floats"):
        model(pixel_values=images().to(torch.uint8), image_index=torch.tensor([0]), branch_input_ids=ids)
    for index, prompts, said in (
        ([0], [[5], [6]], r"image_index \[0\]"),
        ([2], [[5]], "2 images"),
        ([0], [[]], "token"),
    ):
        with pytest.raises(ValueError, match=said):
            model.answer(images(), index, prompts, 4)


@pytest.mark.parametrize(
    ("width", "heads", "layers", "side", "vision_heads"), [(16, 1, 1, 1, 1), (48, 6, 2, 2, 3), (40, 2, 4, 5, 4)]
)
def test_no_size_is_special(width: int, heads: int, layers: int, side: int, vision_heads: int) -> None:
    """A plain row and a branch are the same numbers in any shape."""
    vision = {
        "hidden_size": 24, "num_hidden_layers": layers, "num_heads": vision_heads, "intermediate_size": 20,
        "image_size": 14 * side, "patch_size": 14, "num_positions": side**2 + 1,
    }  # fmt: skip
    torch.manual_seed(1)
    config = CogVLMConfig(
        vocab_size=31, hidden_size=width, intermediate_size=28, num_hidden_layers=layers, num_attention_heads=heads,
        initializer_range=0.2, vision_config=vision,
    )  # fmt: skip
    model = CogVLMForCausalLM(config)
    pixels, text = torch.randn(1, 3, 14 * side, 14 * side), torch.tensor([[5, 6, 7, 8, 9]])
    n = side**2 + 2
    ids = torch.cat([torch.tensor([[1] + [0] * n]), text], dim=1)
    types = torch.tensor([[0] + [1] * n + [0] * 5])
    plain = model(ids, types, None, pixels).logits[:, -5:]
    branch = model(pixel_values=pixels, image_index=torch.tensor([0]), branch_input_ids=text).logits
    torch.testing.assert_close(plain, branch, rtol=1e-4, atol=1e-5)
