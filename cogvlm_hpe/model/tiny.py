"""Makes the packaged `tiny` base: its tokenizer before training, its weights after.

python -m cogvlm_hpe.model.tiny tokenizer
python -m cogvlm_hpe.model.tiny take DIR     what the runs DIR/tower, DIR/whole, DIR/attributes have made, in bf16, with
                                             their curves
python -m cogvlm_hpe.model.tiny check RUN    whether the start of a new training of the tower went as the packaged one
"""

import argparse
import json
import shutil
from itertools import product
from pathlib import Path

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS, format_tags
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.tokenizer import FILE_NAME, train_tokenizer
from cogvlm_hpe.train.auxiliary import COLOURS, KINDS
from launcher.errors import UserError, run_main

STAGES = ("tower", "whole", "attributes")
"""Of its training; each has its config in the package."""
_HEADS = ("head", "left head", "right head", "largest head", "smallest head")
_DIRECTIONS = ("front", "back", "left", "right", "up", "down")
_SAME = 0.01
"""Relative difference of losses that another machine's rounding may make within some ten steps."""
_MARKS = "0123456789 [[ ]] {{ }} , . ; : ? ! - + ( ) ' \" /"


def sentences() -> list[str]:
    """Text that holds every word the tiny base needs whole."""
    prompts = [prompt.format(box="", expression="") for prompt in DEFAULT_PROMPTS.values()]
    things = [f"{colour} {kind}" for colour, kind in product(COLOURS, KINDS)]
    things += [format_tags(thing) for thing in things]
    return [*prompts, *things, *KINDS, *_HEADS, *_DIRECTIONS, " ".join(_DIRECTIONS), _MARKS, _MARKS.replace(" ", "")]


def make_tokenizer(folder: Path) -> None:
    """Write tokenizer.json; a base trained with another one is of no use afterwards."""
    tokenizer = train_tokenizer(sentences())
    tokenizer.save(str(folder / FILE_NAME))
    print(f"{folder / FILE_NAME}: {tokenizer.get_vocab_size()} tokens")


def take(runs: Path, folder: Path) -> None:
    """Copy the last stage's newest weights, in bf16, and the curves of all. Raises UserError where one is missing."""
    import torch
    from safetensors.torch import load_file, save_file

    source = runs / STAGES[-1] / "last" / "model.safetensors"
    for path in (source, *(runs / stage / "metrics.jsonl" for stage in STAGES)):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name the folder that holds the runs {', '.join(STAGES)}")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source).items()}
    target = folder / "model.safetensors"
    save_file(weights, target, metadata={"format": "pt"})
    target.chmod(0o644)  # safetensors makes files only their owner can read
    for stage in STAGES:
        shutil.copy(runs / stage / "metrics.jsonl", folder / f"metrics-{stage}.jsonl")
    print(f"{target}: {sum(t.numel() for t in weights.values()):,} weights")


def check(run: Path, folder: Path) -> None:
    """Compare a run's first losses with those the packaged tower was trained with. Raises UserError where they differ.

    Equal to the printed digits on the machine that made it; another one may round otherwise.
    """
    kept, made = _losses(folder / "metrics-tower.jsonl"), _losses(run / "metrics.jsonl")
    steps = sorted(kept.keys() & made.keys())
    if not steps:
        raise UserError(f"{run}: no step in common with {folder / 'metrics-tower.jsonl'} (steps {sorted(kept)[:2]}, …)")
    for step in steps:
        print(f"step {step}: loss {made[step]:.5f}, the packaged tower's {kept[step]:.5f}")
        if abs(made[step] - kept[step]) > _SAME * kept[step]:
            raise UserError(
                f"{run}, step {step}: loss {made[step]:.5f} instead of {kept[step]:.5f}; recipe or code differ"
            )


def _losses(path: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["global_step"]: row["train/loss_auxiliary"] for row in rows if "train/loss_auxiliary" in row}


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokenizer", "take", "check"))
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN or DIR")
    args = parser.parse_args()
    folder = resolve_base("tiny")
    if args.what == "tokenizer":
        make_tokenizer(folder)
    elif args.run is None:
        parser.error(f"{args.what} needs a folder")
    else:
        {"take": take, "check": check}[args.what](args.run, folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main("tiny", main))
