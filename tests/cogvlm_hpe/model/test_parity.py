"""Against what CogVLM's own code computes: logits, losses, gradients, tower, adapter and greedy tokens."""

from functools import cache
from pathlib import Path

import pytest
import torch

from cogvlm_hpe.model.load import load_base
from cogvlm_hpe.model.modeling import CogVLMForCausalLM

DATA = Path(__file__).parents[2] / "data" / "tiny0"
CASES = ("image_text", "batch_padded", "prefix_text", "two_images", "text_only", "left_padded")
PREFIX = 16 + 3  # image tokens, bos, boi, eoi
TOLERANCE = 1e-4


@cache
def oracle(name: str) -> dict:
    return torch.load(DATA / f"{name}.pt", weights_only=True)


@pytest.fixture
def model() -> CogVLMForCausalLM:
    return load_base(DATA / "hf").eval()


@pytest.mark.parametrize("case", CASES)
def test_plain_call_gives_the_original_logits(model: CogVLMForCausalLM, case: str) -> None:
    given = oracle("inputs")[case]
    output = model(
        given["input_ids"], given["token_type_ids"], given["attention_mask"], given["images"], given["labels"]
    )
    real = given["attention_mask"] == 1
    assert (output.logits - oracle("logits")[case])[real].abs().max() < TOLERANCE
    if given["labels"] is not None:
        assert output.loss.item() == pytest.approx(oracle("extras")[case]["loss"], abs=1e-5)


@pytest.mark.parametrize("case", ["image_text", "batch_padded"])
def test_branches_give_the_original_logits(model: CogVLMForCausalLM, case: str) -> None:
    given = oracle("inputs")[case]
    output = model(
        pixel_values=given["images"],
        image_index=torch.arange(len(given["images"])),
        branch_input_ids=given["input_ids"][:, PREFIX:],
        branch_labels=given["labels"][:, PREFIX:],
        all_logits=True,
    )
    real = given["attention_mask"][:, PREFIX:] == 1
    assert (output.logits - oracle("logits")[case][:, PREFIX:])[real].abs().max() < TOLERANCE


def test_branches_give_the_original_gradients(model: CogVLMForCausalLM) -> None:
    given, expected = oracle("inputs")["image_text"], oracle("extras")["image_text"]
    model(
        pixel_values=given["images"],
        image_index=torch.tensor([0]),
        branch_input_ids=given["input_ids"][:, PREFIX:],
        branch_labels=given["labels"][:, PREFIX:],
    ).loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected["grad_norm"]) > 50
    for name, norm in expected["grad_norm"].items():
        assert norms.get(name, 0.0) == pytest.approx(norm, rel=1e-3, abs=1e-5), name


def test_tower_and_adapter_give_the_original_features(model: CogVLMForCausalLM) -> None:
    expected = oracle("extras")["vision"]
    tokens, patches = model.model.vision(expected["images"])
    assert (patches - expected["vit_out"]).abs().max() < TOLERANCE
    assert (tokens[:, 1:-1] - expected["adapter_out"]).abs().max() < TOLERANCE


def test_greedy_answer_is_the_original_one(model: CogVLMForCausalLM) -> None:
    expected = oracle("extras")["generate"]
    prompt = expected["prompt_input_ids"][0, PREFIX:].tolist()
    [answer] = model.answer(expected["images"], [0], [prompt], max_new_tokens=len(expected["new_tokens"]))
    assert answer == list(expected["new_tokens"])
