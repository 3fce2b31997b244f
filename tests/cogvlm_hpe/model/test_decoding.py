"""Answers from a shared prefix cache, transformers' generate, and the distribution over an angle's digits."""

import pytest
import torch
from small_model import images, small_model

from cogvlm_hpe.model.configuration import PUBLISHED, CogVLMConfig
from cogvlm_hpe.model.decoding import code_distributions
from cogvlm_hpe.model.experts import rope_table
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from launcher.errors import UserError

DIGITS = list(range(20, 30))


@pytest.fixture
def model() -> CogVLMForCausalLM:
    return small_model().eval()


def test_generate_gives_the_same_tokens_as_answer(model: CogVLMForCausalLM) -> None:
    prompt = [5, 6, 7]
    [expected] = model.answer(images(1), [0], [prompt], 8)
    ids = torch.tensor([[1, *[0] * 11, *prompt]])
    types = torch.tensor([[0, *[1] * 11, *[0] * len(prompt)]])
    out = model.generate(
        input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids), pixel_values=images(1),
        max_new_tokens=8, do_sample=False,
    )  # fmt: skip
    answer = out[0, ids.shape[1] :].tolist()
    assert (answer[: answer.index(2)] if 2 in answer else answer) == expected


def test_generate_on_a_left_padded_batch_equals_single_rows(model: CogVLMForCausalLM) -> None:
    rows = [[1, 5, 6, 7, 8], [1, 9, 9]]
    alone = [model.generate(input_ids=torch.tensor([row]), max_new_tokens=6, do_sample=False)[0] for row in rows]
    ids, mask = torch.tensor([rows[0], [0, 0, *rows[1]]]), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    both = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for single, row, together in zip(alone, rows, both, strict=True):
        new = single[len(row) :]
        assert torch.equal(together[5 : 5 + len(new)], new)


def test_each_answer_has_its_own_limit(model: CogVLMForCausalLM) -> None:
    free = model.answer(images(1), [0, 0], [[5, 6, 7], [8]], 6)
    assert min(len(answer) for answer in free) >= 4, "an early eos would make this test say nothing"
    assert model.answer(images(1), [0, 0], [[5, 6, 7], [8]], [2, 4]) == [free[0][:2], free[1][:4]]


def test_an_answer_ends_at_eos_and_others_go_on(model: CogVLMForCausalLM) -> None:
    prompts = [[5, 6, 7], [8]]
    free = model.answer(images(1), [0, 0], prompts, 6)
    eos = next(token for token in free[0][1:] if token not in free[1])
    model.config.eos_token_id = eos
    assert model.answer(images(1), [0, 0], prompts, 6) == [free[0][: free[0].index(eos)], free[1]]


def test_no_questions_no_answers(model: CogVLMForCausalLM) -> None:
    assert model.answer(images(1), [], [], 4) == []


def test_distribution_over_codes_is_that_of_every_code_written_out(model: CogVLMForCausalLM) -> None:
    prompts = [[5, 6], [7, 8, 9], [4]]
    answers = [[30, 20, 24, 25, 31, 21, 29, 20, 32], [30, 22, 27, 20, 31, 20, 20, 29, 32], [30] + [23] * 3 + [31] * 4]
    answers[2][5:8] = [20, 28, 28]
    index = [1, 0, 1]
    with torch.no_grad():
        prefix = model.model.encode_prefix(images(), adapted=True)
        found = code_distributions(model, prefix, index, prompts, answers, DIGITS)
    assert found.shape == (3, 2, 361)
    codes = [f"{code:03d}" for code in range(361)]
    for row, (image, prompt, answer) in enumerate(zip(index, prompts, answers, strict=True)):
        for number, start in enumerate((1, 5)):
            written = [[*prompt, *answer[:start], *(20 + int(digit) for digit in code)] for code in codes]
            with torch.no_grad():
                logits = model(
                    pixel_values=images()[[image]],
                    image_index=torch.zeros(361, dtype=torch.long),
                    branch_input_ids=torch.tensor(written),
                ).logits
            log_p = logits.log_softmax(-1)[:, -4:-1].gather(2, torch.tensor(written)[:, -3:, None])[..., 0]
            torch.testing.assert_close(found[row, number], log_p.sum(dim=1).softmax(dim=0), rtol=1e-3, atol=1e-6)


def test_bf16_rotary_table_is_the_one_cogvlm_was_trained_with() -> None:
    positions = torch.arange(1001)
    exact, rounded = (rope_table(positions, 128, 1e4, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact[0].dtype == torch.float32 and rounded[0].dtype == torch.bfloat16
    angle = [torch.atan2(sin.float(), cos.float())[:, 1] for cos, sin in (exact, rounded)]
    gap = ((angle[1] - angle[0] + torch.pi) % (2 * torch.pi) - torch.pi).abs()
    assert 0.005 < gap[16] < 0.05 and gap[1000] > 0.5
    assert torch.equal(rounded[0][256], rounded[0][257]), "positions above 256 collide"


def test_the_switch_for_the_rotary_table_changes_a_bf16_model_a_little() -> None:
    ids = torch.arange(3, 39)[None]
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = small_model(rope_dtype=dtype).to(torch.bfloat16)
        logits[dtype] = model(input_ids=ids).logits.float()
    gap = (logits["float32"] - logits["bfloat16"]).abs().max()
    assert 0 < gap < 0.2 * logits["float32"].abs().max()


@pytest.mark.parametrize(("name", "tokens"), [("cogvlm-grounding-generalist", 1225), ("cogvlm-base-224", 256)])
def test_published_configurations_by_name(name: str, tokens: int) -> None:
    config = CogVLMConfig.named(name)
    assert config.image_tokens == tokens
    assert config.vision_config["num_positions"] == tokens + 1
    assert config.vision_config["num_hidden_layers"] == 63
    assert CogVLMConfig.named("tiny").image_tokens == 100
    with pytest.raises(UserError, match="no base model there"):
        CogVLMConfig.named("cogvlm-none")
    assert set(PUBLISHED) == {"cogvlm-grounding-generalist", "cogvlm-chat", "cogvlm-base-490", "cogvlm-base-224"}
