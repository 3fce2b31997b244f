"""The tiny tokenizer keeps words whole; Llama's kind of tokenizer.model is read as sentencepiece itself reads it."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS, format_box, format_pose
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.tiny import sentences
from cogvlm_hpe.model.tokenizer import (
    FILE_NAME,
    SENTENCEPIECE_NAME,
    SpecialIds,
    load_tokenizer,
    read_sentencepiece,
    special_ids,
)
from launcher.errors import UserError

TOKENIZER = load_tokenizer(resolve_base("tiny"))

# How Llama's tokenizer.model was trained, as far as its own settings say.
LIKE_LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "allow_whitespace_only_pieces": True,
}
HARD_TEXTS = [
    "", " ", "  ", "   ", " a", "  a", "a ", "a  ", "a  b", " the  red   cube    ", " " * 37, "\t", "\n", "\n\n",
    "\t\n \n", "▁", "▁▁a", " ▁ a", "\x00", "\x01\x1f\x7f", "\ufeff\u200b\u00a0\u3000", "é", "e\u0301", "ﬁ Ａ",
    "早上好，世界", "😀", "👩\u200d👩\u200d👧 🚀 ok", "𝔸\U0010ffff", "<s>", "</s><unk>", "<0x41>", "1234567890", "3.14",
    "-179", "[[012,345,678,999]]", "{{180,090,180}}", "[[ [[[ ]]]] {{{ }}", "Where is the red cube? ",
    "Question: Where is it? Answer:",
]  # fmt: skip


def encode(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


def train(**changes: object) -> bytes:
    """A sentencepiece model of the sentences of the tiny base and some boxes and poses, by sentencepiece's trainer."""
    boxes = [f"the cube at [[{n:03d},{n * 7 % 1000:03d},{n * 3 % 1000:03d},999]]" for n in range(0, 999, 37)]
    poses = [f"{{{{{n:03d},090,{360 - n}}}}}  and   then    some     spaces" for n in range(0, 360, 17)]
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences(), *boxes, *poses] * 3), model_writer=written, minloglevel=2,
        num_threads=1, hard_vocab_limit=False, **({"vocab_size": 600} | LIKE_LLAMA | changes),
    )  # fmt: skip
    return written.getvalue()


def with_space_runs(model: bytes) -> bytes:
    """The model with pieces of 2 to 16 spaces that share the worst score there is, as Llama's has them."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in [piece for piece in proto.pieces if set(piece.piece) == {"▁"} and len(piece.piece) > 1]:
        proto.pieces.remove(piece)
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11):
        proto.pieces.add(piece="▁" * length, score=-1e9)
    return proto.SerializeToString()


@cache
def pair() -> tuple[Tokenizer, SentencePieceProcessor]:
    """Ours and sentencepiece's own, of one model."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SENTENCEPIECE_NAME
        path.write_bytes(with_space_runs(train()))
        return load_tokenizer(folder), SentencePieceProcessor(model_file=str(path))


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / SENTENCEPIECE_NAME
        path.write_bytes(content)
        return path

    return write


def assert_alike(text: str) -> None:
    ours, law = pair()
    ids = law.encode(text)
    assert ours.encode(text, add_special_tokens=False).ids == ids
    assert ours.decode(ids) == law.decode(ids)


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
@example("<s>")
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", HARD_TEXTS, ids=repr)
def test_hard_texts_are_read_as_sentencepiece_reads_them(text: str) -> None:
    assert_alike(text)


@given(st.text(max_size=60))
def test_any_text_is_read_as_sentencepiece_reads_it(text: str) -> None:
    assert_alike(text)


@given(st.lists(st.sampled_from([*"ab eht[]{},0159▁\n", "  ", "the ", "cube", "[[", "}}"]), max_size=40).map("".join))
def test_text_near_the_vocabulary_is_read_as_sentencepiece_reads_it(text: str) -> None:
    assert_alike(text)


def test_the_model_under_test_is_like_llamas() -> None:
    _, law = pair()
    pieces = [law.id_to_piece(n) for n in range(len(law))]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert {"<0x00>", "<0xFF>", "[[", "]]", "}}"} <= set(pieces)
    assert {"[[", "{{"} <= {piece.lstrip("▁") for piece in pieces}
    assert not any(digit in piece for piece in pieces[259:] for digit in "0123456789" if len(piece) > 1)
    assert law.encode(" " * 20, out_type=str) == ["▁" * 16, "▁" * 5]


def test_no_text_makes_a_control_token_and_answers_drop_them() -> None:
    ours, _ = pair()
    assert special_ids(ours) == special_ids(TOKENIZER) == SpecialIds(bos=1, eos=2, pad=0)
    for tokenizer in (ours, TOKENIZER):
        ids = tokenizer.encode("a <s></s><unk>", add_special_tokens=False).ids
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode([1, *ids, 2, 0], skip_special_tokens=True) == "a <s></s><unk>"


def test_saved_as_json_it_reads_the_same(tmp_path: Path) -> None:
    ours, _ = pair()
    ours.save(str(tmp_path / FILE_NAME))
    again = load_tokenizer(tmp_path)
    for text in HARD_TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == ids
        assert again.decode(ids) == ours.decode(ids)


def test_the_sentencepiece_model_wins_over_a_conversion_of_it(written) -> None:
    path = written(train())
    TOKENIZER.save(str(path.parent / FILE_NAME))
    for place in (path.parent, path):
        assert load_tokenizer(place).get_vocab_size() == len(SentencePieceProcessor(model_file=str(path)))
    path.unlink()
    assert load_tokenizer(path.parent).get_vocab_size() == TOKENIZER.get_vocab_size()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["<box>"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_models_of_another_kind_are_refused(written, changes: dict) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model: not of the kind of Llama's") as caught:
        read_sentencepiece(written(train(**changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n", b"IQ== 0\nIg== 1\n"],
    ids=["empty", "git-lfs", "tiktoken"],
)
def test_what_is_no_sentencepiece_model_is_told(written, content: bytes) -> None:
    with pytest.raises(UserError, match="not a sentencepiece model"):
        read_sentencepiece(written(content))


def test_a_cut_model_and_a_broken_json_are_told(written) -> None:
    path = written(train()[:3000])
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(path.parent)
    path.unlink()
    (path.parent / FILE_NAME).write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer(path.parent)


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_must_fit_the_models_table(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    size = TOKENIZER.get_vocab_size()
    TOKENIZER.save(str(tmp_path / FILE_NAME))
    load_tokenizer(tmp_path, vocab_size=size)
    load_tokenizer(tmp_path, vocab_size=size + 10)
    assert not recwarn.list
    with pytest.raises(UserError, match=rf"{size} tokens, but the model's vocab_size is {size - 1}"):
        load_tokenizer(tmp_path, vocab_size=size - 1)
    with pytest.warns(UserWarning, match=f"{size} tokens for a model with vocab_size 32000"):
        load_tokenizer(tmp_path, vocab_size=32000)
