"""Text to tokens and back, by the `tokenizers` library.

A conversation is encoded in pieces, prompt and answer each on its own, so that an answer's tokens do not depend on
the question before it (as CogVLM's own data pipeline does). Text never makes a control token: "<s>" in a question is
three characters, as in sentencepiece.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from launcher.errors import UserError

FILE_NAME = "tokenizer.json"
SENTENCEPIECE_NAME = "tokenizer.model"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 as in Llama: unk doubles as padding

_HARD_TEXTS = (" ", "  two  spaces ", "\n\ttab\x00", "ﬁ Ａ e\u0301", "😀 早上", "1 [[012,345]] {{678}}", "<s>", "▁")
_OWN_PIECES = 1000
_SPARE_ROWS = 128  # tables are rounded up so far at most


@dataclass(frozen=True)
class SpecialIds:
    """Ids that no text makes. Llama's tokenizer has no padding: unk, which byte fallback leaves unused, serves."""

    bos: int
    eos: int
    pad: int


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a folder: Llama's tokenizer.model (sentencepiece), or else a tokenizer.json; or of such a file.

    Where both are there the former counts: it is what the base was trained with, while a tokenizer.json beside it is a
    conversion, whose faithfulness depends on who made it. `vocab_size` is the model's. Raises UserError when the folder
    has neither, when the file is not such a file, or when the tokenizer has more tokens than the model.
    """
    path = find_tokenizer(folder)
    if path is None:
        raise UserError(
            f"{folder}: no {SENTENCEPIECE_NAME} or {FILE_NAME} there; put or link one beside the weights (for a "
            "published CogVLM that of lmsys/vicuna-7b-v1.5), or name its folder by model.tokenizer in a training config"
        )
    tokenizer = read_sentencepiece(path) if path.suffix == ".model" else _read_json(path)
    tokenizer.encode_special_tokens = True
    if vocab_size is not None:
        check_size(tokenizer, vocab_size, path)
    return tokenizer


def find_tokenizer(folder: str | Path) -> Path | None:
    """The file that `load_tokenizer` reads, if there is one."""
    paths = [Path(folder), Path(folder) / SENTENCEPIECE_NAME, Path(folder) / FILE_NAME]
    return next((path for path in paths if path.is_file()), None)


def check_size(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    """Raise UserError where ids would fall outside the model's table; warn where many of its rows are never used."""
    size = tokenizer.get_vocab_size()
    if size > vocab_size:
        raise UserError(f"{path}: {size} tokens, but the model's vocab_size is {vocab_size}; take the base's tokenizer")
    if vocab_size - size > _SPARE_ROWS:
        said = f"{path}: {size} tokens for a model with vocab_size {vocab_size}; is it the base's tokenizer?"
        warnings.warn(said, stacklevel=3)


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of <s>, </s> and <unk>: 1, 2 and 0 in Llama's. Raises UserError where one is missing."""
    unk, bos, eos = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    if unk is None or bos is None or eos is None:
        raise UserError(f"the tokenizer lacks one of {' '.join(SPECIAL_TOKENS)}; take the base's tokenizer")
    return SpecialIds(bos=bos, eos=eos, pad=unk)


def read_sentencepiece(path: Path) -> Tokenizer:
    """A BPE tokenizer.model as sentencepiece itself applies it: same ids, same text back.

    sentencepiece joins the two neighbours whose joint piece scores highest, wherever it was learnt from, so each split
    of a piece into two pieces is a merge, ranked by the score of the whole. Raises UserError for what is no such model,
    and for one that is not of Llama's kind and so is not reproduced.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        law = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a sentencepiece model ({error}); copy it again") from None
    pieces = [law.id_to_piece(number) for number in range(len(law))]
    control = [piece for n, piece in enumerate(pieces) if law.is_unknown(n) or law.is_control(n)]
    scores = {
        piece: law.get_score(n)
        for n, piece in enumerate(pieces)
        if not (law.is_unknown(n) or law.is_control(n) or law.is_byte(n))
    }
    # Equal scores (Llama's runs of spaces have one) stay in the order of ids: sorting is stable.
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    unk = pieces[law.unk_id()]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk, byte_fallback=True, fuse_unk=True))
    _put_spaces(tokenizer)
    tokenizer.add_special_tokens(control)
    tokenizer.encode_special_tokens = True
    _check_faithful(path, tokenizer, law, list(scores))
    return tokenizer


def _check_faithful(path: Path, tokenizer: Tokenizer, law: Any, pieces: list[str]) -> None:
    """Raise UserError unless both read hard texts, and one made of the model's own pieces, alike.

    That finds unigram models, other normalisers, missing byte fallback, and pieces no merges lead to.
    """
    own = "".join(pieces[:: max(1, len(pieces) // _OWN_PIECES)])
    for text in (*_HARD_TEXTS, own):
        ids = law.encode(text)
        if tokenizer.encode(text, add_special_tokens=False).ids != ids or tokenizer.decode(ids) != law.decode(ids):
            raise UserError(
                f"{path}: not of the kind of Llama's tokenizer.model (BPE with byte fallback, text as it is), so that "
                f"{text[:20]!r} would be read in another way than by sentencepiece; give a {FILE_NAME} in its place"
            )


def _read_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({str(error).partition(chr(10))[0]}); copy it again") from None


def train_tokenizer(sentences: Iterable[str]) -> Tokenizer:
    """A small byte-fallback BPE that keeps every word of `sentences` whole.

    As in Llama's vocabulary a digit is one token, and so is each of `[[`, `]]`, `{{`, `}}`; other characters fall
    back to bytes, so any text can be written.
    """
    learned = _bare(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, show_progress=False)
    learned.train_from_iterator(sorted(set(sentences)), trainer)
    model = json.loads(learned.to_str())["model"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocab = {piece: number for number, piece in enumerate([*SPECIAL_TOKENS, *byte_tokens, *pieces])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = _bare(models.BPE(vocab, merges, unk_token=SPECIAL_TOKENS[0], byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _bare(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    _put_spaces(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"▁?\[\[|\]\]|▁?\{\{|\}\}|\d|▁?[A-Za-z]+|[^A-Za-z\d]"), behavior="isolated"
    )
    return tokenizer


def _put_spaces(tokenizer: Tokenizer) -> None:
    """A space is ▁, and one goes in front of any text that is not empty, even of one that begins with spaces."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
