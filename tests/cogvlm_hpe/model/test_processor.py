"""The processor: prompts as CogVLM writes them, pixels as training sees them, rows the model's two calls agree on."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import VISION

from cogvlm_hpe.model import CogVLMConfig, CogVLMForCausalLM, CogVLMProcessor, CogVLMTokenizer
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.pixels import normalise
from cogvlm_hpe.model.processor import fill_boxes, write_prompt
from cogvlm_hpe.model.tokenizer import FILE_NAME, load_tokenizer, train_tokenizer
from launcher.errors import UserError
from shards.pixels import decode_image

PUBLISHED = Path(__file__).parents[2] / "data" / "tiny0" / "hf"
TOKENIZER = load_tokenizer(resolve_base("tiny"))
SIDE_PX, IMAGE_TOKENS = VISION["image_size"], 9
QUESTION = "What is the pose of the head at {box}?"


@pytest.fixture
def processor() -> CogVLMProcessor:
    return CogVLMProcessor(CogVLMTokenizer.around(TOKENIZER), SIDE_PX)


@pytest.fixture
def model() -> CogVLMForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vocab_size = TOKENIZER.get_vocab_size()
    return CogVLMForCausalLM(
        CogVLMConfig(vocab_size=vocab_size, initializer_range=0.2, vision_config=dict(VISION), **sizes)
    ).eval()


def picture(seed: int, width: int = 120, height: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("template", "history", "prompt"),
    [
        ("base", [], "q"),
        ("chat", [], "Question: q Answer:"),
        ("vqa", [], "Question: q Short answer:"),
        ("chat", [("q1", "a1")], "Question: q1 Answer: a1\nQuestion: q Answer:"),
        ("chat", [("q1", "a1"), ("q2", "a2")], "Question: q1 Answer: a1\nQuestion: q2 Answer: a2\nQuestion: q Answer:"),
    ],
)
def test_prompts_are_those_of_cogvlm(processor: CogVLMProcessor, template: str, history: list, prompt: str) -> None:
    assert write_prompt("q", template, history) == prompt
    row = processor(text="q", template=template, history=history)
    assert row["input_ids"].tolist() == [[1, *ids(prompt)]]


def test_boxes_stand_where_the_question_says() -> None:
    boxes = [(12, 8, 60, 79.9), (0, 0, 120, 80)]
    filled = fill_boxes("Is {box} left of {box}?", boxes, 120, 80)
    assert filled == "Is [[100,100,500,998]] left of [[000,000,999,999]]?"


def test_a_row_is_bos_image_slots_and_text(processor: CogVLMProcessor) -> None:
    row = processor(images=picture(0), text=QUESTION, boxes=[(12, 8, 60, 72)])
    text = ids("What is the pose of the head at [[100,100,500,900]]?")
    slots = IMAGE_TOKENS + 2
    assert row["input_ids"].tolist() == [[1, *[0] * slots, *text]]
    assert row["token_type_ids"].tolist() == [[0, *[1] * slots, *[0] * len(text)]]
    assert row["attention_mask"].tolist() == [[1] * (1 + slots + len(text))]
    assert row["pixel_values"].shape == (1, 3, SIDE_PX, SIDE_PX)
    assert list(row) == processor.model_input_names


def test_a_picture_of_more_than_8_bits_is_refused(processor: CogVLMProcessor) -> None:
    with pytest.raises(ValueError, match=r"mode I;16, of more than 8 bits; make it 8-bit"):
        processor(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "Where is the head?")


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_padded_on_the_side_asked_for(processor: CogVLMProcessor, side: str) -> None:
    batch = processor([picture(0), None], ["Where is the head?", "up"], padding_side=side)
    alone = [processor(picture(0), "Where is the head?"), processor(text="up")]
    assert len(batch["pixel_values"]) == 1
    for number, single in enumerate(alone):
        real = batch["attention_mask"][number] == 1
        assert int(real.sum()) == single["input_ids"].shape[1]
        for name in ("input_ids", "token_type_ids"):
            assert torch.equal(batch[name][number][real], single[name][0])
            assert not batch[name][number][~real].any()
    assert bool(batch["attention_mask"][1, 0]) == (side == "right")


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_call_and_branch_call_agree(processor: CogVLMProcessor, model: CogVLMForCausalLM, side: str) -> None:
    pictures, index = [picture(0), picture(1, 60, 90)], [0, 1, 1]
    texts = [QUESTION, "Where is the red cube?", QUESTION]
    boxes = [[(10, 20, 50, 70)], [], [(1, 2, 33, 44.5)]]
    rows = processor([pictures[i] for i in index], texts, boxes, padding_side=side)
    branches = processor.branches(pictures, texts, index, boxes)
    with torch.no_grad():
        plain, shared = model(**rows).logits, model(**branches).logits
    for row, mask, branch, branch_mask in zip(
        plain, rows["attention_mask"], shared, branches["branch_attention_mask"], strict=True
    ):
        text = row[mask == 1][IMAGE_TOKENS + 3 :]
        assert text.abs().max() > 0.1
        assert (text - branch[branch_mask == 1]).abs().max() < 1e-5


def test_answers_of_generate_and_of_shared_prefixes_agree(processor: CogVLMProcessor, model: CogVLMForCausalLM) -> None:
    texts, index = ["Where is the red cube?", "up"], [0, 1]
    rows = processor([picture(0), picture(1)], texts, padding_side="left")
    made = model.generate(**rows, max_new_tokens=5, do_sample=False)[:, rows["input_ids"].shape[1] :]
    branches = processor.branches([picture(0), picture(1)], texts, index)
    answers = model.answer(branches["pixel_values"], index, [ids(text) for text in texts], 5)
    for row, answer in zip(made.tolist(), answers, strict=True):
        assert row[: len(answer)] == answer
    assert len(processor.parse_answers(made)) == 2


def test_pixels_are_those_of_training_whatever_the_image_comes_as(processor: CogVLMProcessor) -> None:
    pixels = picture(3)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    trained = normalise(decode_image(png.getvalue(), "png", SIDE_PX)[None])
    frozen = pixels.copy()
    frozen.flags.writeable = False
    for image in (
        pixels,
        frozen,
        np.asfortranarray(pixels),
        pixels[:, :, ::-1].copy()[:, :, ::-1],
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
        Image.fromarray(pixels),
        Image.fromarray(pixels).convert("RGBA"),
    ):
        assert torch.equal(processor(image, "up")["pixel_values"], trained)


def test_pixels_are_close_to_pillows_bicubic(processor: CogVLMProcessor) -> None:
    pixels = picture(4, 97, 210)
    theirs = np.array(Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))
    expected = normalise(torch.from_numpy(theirs).permute(2, 0, 1)[None])
    difference = (processor(pixels, "up")["pixel_values"] - expected).abs() * 255 * 0.26
    assert difference.max() < 2.5
    assert difference.mean() < 0.2


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": "q", "template": "long"}, "template 'long'"),
        ({"text": "q", "history": [("a", "b")]}, "history"),
        ({"text": QUESTION, "images": picture(0)}, "0 boxes for the 1"),
        ({"text": "q", "images": picture(0), "boxes": [(0, 0, 1, 1)]}, "1 boxes for the 0"),
        ({"text": QUESTION, "boxes": [(0, 0, 1, 1)]}, "no image"),
        ({"text": QUESTION, "images": picture(0), "boxes": [(5, 0, 1, 1)]}, "x0 < x1"),
        ({"text": QUESTION, "images": picture(0), "boxes": [(5, 0, 7)]}, "x0, y0, x1, y1"),
        ({"text": ["q", "p"], "images": picture(0)}, "images: one for 2 texts"),
        ({"text": ["q", "p"], "images": [picture(0)]}, "images: 1 for 2 texts"),
        ({"text": ["q", "p"], "boxes": [[]]}, "boxes: 1 for 2 texts"),
        ({"text": "q", "images": picture(0).astype(np.float32)}, "float32: must be"),
        ({"text": "q", "images": picture(0)[..., 0]}, "must be"),
        ({"text": "q", "images": torch.zeros(8, 8, 3, dtype=torch.uint8)}, r"must be \(3, H, W\)"),
        ({"text": "q", "return_tensors": "np"}, "return_tensors"),
    ],
)
def test_what_does_not_fit_together_is_told(processor: CogVLMProcessor, call: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        processor(**call)


def test_an_image_must_be_one(processor: CogVLMProcessor) -> None:
    with pytest.raises(TypeError, match="of type str"):
        processor("head.png", "q")


def test_branches_name_their_images(processor: CogVLMProcessor) -> None:
    alone = processor.branches(picture(0), ["up", "Where is the head?"])
    assert alone["image_index"].tolist() == [0, 0]
    assert len(alone["pixel_values"]) == 1
    with pytest.raises(ValueError, match="image_index"):
        processor.branches([picture(0), picture(1)], ["up"])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        processor.branches([picture(0), picture(1)], ["up"], [2])


def test_answers_are_read_as_boxes_and_poses(processor: CogVLMProcessor) -> None:
    texts = ["{{210,100,180}}", " [[100,250,500,750]]", "[[100,250,500,750]] {{210,100,180}}", "a cat"]
    for answers in (texts, [[*ids(text), 2] for text in texts]):
        pose, box, blended, other = processor.parse_answers(answers, sizes_px=[(200, 100)] * 4)
        assert pose.pose_deg == (30.0, 10.0, 0.0)
        assert box.boxes == [pytest.approx((20.0, 25.0, 100.0, 75.0))]
        assert (blended.kind, other.kind) == ("blended", "other")
    assert processor.parse_answers(texts[1:2])[0].boxes == [(0.1, 0.25, 0.5, 0.75)]


def test_saved_it_comes_back(processor: CogVLMProcessor, tmp_path: Path) -> None:
    chat = CogVLMProcessor(processor.tokenizer, SIDE_PX, 14, "chat", "signed")
    chat.save_pretrained(tmp_path)
    again = CogVLMProcessor.from_pretrained(tmp_path)
    row, expected = again(picture(0), "up </s>"), chat(picture(0), "up </s>")
    for name in expected:
        assert torch.equal(row[name], expected[name])
    assert again.parse_answers(["{{-30,0,0}}"])[0].pose_deg == (-30.0, 0.0, 0.0)


def test_a_published_folder_and_a_tokenizers_folder_make_one(tmp_path: Path) -> None:
    train_tokenizer(["Where is it"]).save(str(tmp_path / FILE_NAME))
    processor = CogVLMProcessor.from_pretrained(PUBLISHED, tokenizer=tmp_path)
    assert (processor.image_size, processor.image_tokens, processor.template) == (56, 16, "chat")
    with pytest.raises(UserError, match=r"model\.tokenizer"):
        CogVLMProcessor.from_pretrained(PUBLISHED)
    with pytest.raises(UserError, match=rf"{TOKENIZER.get_vocab_size()} tokens, but the model's vocab_size is 320"):
        CogVLMProcessor.from_pretrained(PUBLISHED, tokenizer=resolve_base("tiny"))


def test_an_adapters_processor_is_its_bases_with_its_own_answers(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "tiny"}))
    (tmp_path / "hpe.json").write_text(json.dumps({"answer_format": "signed"}))
    processor, base = CogVLMProcessor.from_pretrained(tmp_path), CogVLMProcessor.from_pretrained(resolve_base("tiny"))
    assert (processor.image_size, processor.template) == (base.image_size, base.template)
    assert processor.tokenizer("Where is the head?") == base.tokenizer("Where is the head?")
    assert (processor.answer_format, base.answer_format) == ("signed", "offset")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base"):
        CogVLMProcessor.from_pretrained(tmp_path)


def test_what_was_tuned_on_a_chat_base_is_asked_as_training_asked(tmp_path: Path) -> None:
    train_tokenizer(["Where is it"]).save(str(tmp_path / FILE_NAME))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(PUBLISHED)}))
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_bytes((PUBLISHED / "config.json").read_bytes())
    (merged / "hpe.json").write_text("{}")
    for folder in (tmp_path / "adapter", merged):
        assert CogVLMProcessor.from_pretrained(folder, tokenizer=tmp_path).template == "base"


def test_a_tokenizer_is_read_from_its_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(resolve_base("tiny"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        CogVLMTokenizer.from_pretrained(tmp_path)


def test_the_tokenizer_adds_nothing_of_itself(processor: CogVLMProcessor) -> None:
    assert processor.tokenizer("  up </s>")["input_ids"] == ids("  up </s>")
    assert not {0, 1, 2} & set(processor.tokenizer("  up </s>")["input_ids"])
