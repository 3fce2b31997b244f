"""The tiny tokenizer: whole words, single digits, and any text can be written."""

from hypothesis import given
from hypothesis import strategies as st

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS, format_box, format_pose
from cogvlm_hpe.model.load import resolve_base
from cogvlm_hpe.model.tiny import sentences
from cogvlm_hpe.model.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(resolve_base("tiny"))


def encode(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


def test_digits_and_brackets_are_single_tokens() -> None:
    assert encode(format_box((10, 20, 30, 40), 100, 100)) == [
        *("▁[[", *"100", ",", *"200", ",", *"300", ",", *"400", "]]")
    ]
    assert encode(format_pose(0, 0, 0)) == ["▁{{", *"180", ",", *"090", ",", *"180", "}}"]


def test_words_of_prompts_and_expressions_are_whole() -> None:
    for prompt in DEFAULT_PROMPTS.values():
        words = prompt.format(box="", expression="").replace("?", " ?").split()
        assert len([t for t in encode(prompt.format(box="", expression="")) if t != "▁"]) == len(words)
    assert encode("red cube") == ["▁red", "▁cube"]


def test_packaged_tokenizer_covers_its_sentences() -> None:
    for sentence in sentences():
        ids = TOKENIZER.encode(sentence, add_special_tokens=False).ids
        assert 0 not in ids
        assert TOKENIZER.decode(ids) == sentence


@given(st.text(max_size=40).filter(lambda t: "▁" not in t))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids) == text
