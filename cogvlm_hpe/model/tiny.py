"""Makes the tokenizer of the packaged `tiny` base: `python -m cogvlm_hpe.model.tiny`."""

from itertools import product

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS
from cogvlm_hpe.model.load import resolve_base
from cogvlm_hpe.model.tokenizer import FILE_NAME, train_tokenizer
from cogvlm_hpe.train.auxiliary import COLOURS, KINDS

_HEADS = ("head", "left head", "right head", "largest head", "smallest head")
_DIRECTIONS = ("front", "back", "left", "right", "up", "down")
_MARKS = "0123456789 [[ ]] {{ }} , . ; : ? ! - + ( ) ' \" /"


def sentences() -> list[str]:
    """Text that holds every word the tiny base needs whole."""
    prompts = [prompt.format(box="", expression="") for prompt in DEFAULT_PROMPTS.values()]
    things = [f"{colour} {kind}" for colour, kind in product(COLOURS, KINDS)]
    return [*prompts, *things, *KINDS, *_HEADS, *_DIRECTIONS, " ".join(_DIRECTIONS), _MARKS, _MARKS.replace(" ", "")]


def main() -> None:
    """Write the tokenizer beside the packaged config."""
    folder = resolve_base("tiny")
    tokenizer = train_tokenizer(sentences())
    tokenizer.save(str(folder / FILE_NAME))
    print(f"{folder / FILE_NAME}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
