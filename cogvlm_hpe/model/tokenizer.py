"""Text to tokens and back, by the `tokenizers` library.

A conversation is encoded in pieces, prompt and answer each on its own, so that an answer's tokens do not depend on
the question before it (as CogVLM's own data pipeline does).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from launcher.errors import UserError

FILE_NAME = "tokenizer.json"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 as in Llama: unk doubles as padding


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises UserError when the folder has none."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder that holds the tokenizer by model.tokenizer")
    return Tokenizer.from_file(str(path))


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
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"▁?\[\[|\]\]|▁?\{\{|\}\}|\d|▁?[A-Za-z]+|[^A-Za-z\d]"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
