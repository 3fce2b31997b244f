"""`cogvlm-hpe convert`: bases and LoRA adapters from Hugging Face form into SAT form, and back."""

import argparse
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    from cogvlm_hpe.model.convert import Source

HELP = "turn checkpoints and adapters of the original SAT code into Hugging Face form, or back"
DETAILS = """
what is written, by what SRC is
  base (config.json or model_config.json)
    --to hf      config.json and safetensors
    --to sat     model_config.json, latest, 1/mp_rank_XX_model_states.pt
  SAT checkpoint with an unmerged LoRA
    --to hf      its base, and the LoRA as a peft adapter in DST/adapter
    --only-adapter --to hf   the peft adapter alone; SRC stays its base
    --to sat     the same again
  peft adapter (its adapter_config.json or --base names the base)
    --to sat     base and unmerged LoRA, as SAT's fine-tuning saves them
  --merge adds the LoRA to the weights instead: a base, in either form.

Files of several GB are read and written a tensor at a time. Tokenizer files beside SRC are copied.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of convert."""
    add = parser.add_argument
    parser.epilog = DETAILS
    add("source", type=Path, metavar="SRC", help="folder of a base or of an adapter, in either form")
    add("out", type=Path, metavar="DST", help="folder to make; must not exist")
    add("--to", choices=("hf", "sat"), required=True, help="form to write")
    add("--mp", type=int, default=1, metavar="N", help="sat: split over N model-parallel files (default: 1)")
    add("--merge", action="store_true", help="add the LoRA to the weights it lies on")
    add("--only-adapter", action="store_true", help="hf: write the LoRA of a SAT checkpoint and not its base")
    add("--base", type=Path, metavar="DIR", help="base of a peft adapter, if not the one it names")
    add(
        "--lora-alpha", type=float, default=1.0, metavar="A",
        help="alpha of an unmerged SAT LoRA, which its file does not hold (default: 1, as in SAT's recipe)",
    )  # fmt: skip
    add(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="hf: size of a safetensors file (default: 5)"
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written. Raises UserError or UsageError for the user's mistakes."""
    _check(args)
    from cogvlm_hpe.model import convert
    from cogvlm_hpe.model.tuned import TunedWeights

    source = convert.open_source(args.source, args.base, args.lora_alpha)
    if not source.factors and (args.merge or args.only_adapter):
        flag = "--merge" if args.merge else "--only-adapter"
        raise UsageError(f"{flag}: there is no LoRA in {args.source}; leave the flag out")
    if source.is_peft and args.to == "hf" and not args.merge:
        raise UsageError(f"{args.source}: is a Hugging Face (peft) adapter already; --merge adds it to its base")
    if args.merge:
        source = convert.merged(source)
    try:
        _write(source, args)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be written ({error.strerror}); nothing is left of it there") from None
    if isinstance(source.weights, TunedWeights) and any(source.weights.losses.values()):
        losses = source.weights.losses.values()
        said = f"{median(losses):.2%} in the median layer, {max(losses):.2%} at most"
        print(f"rounding to the base's dtype changed the LoRA's part by {said}")
    print(f"wrote {args.out}")
    return 0


def _write(source: "Source", args: argparse.Namespace) -> None:
    from cogvlm_hpe.model import convert

    if args.only_adapter:
        convert.write_adapter_only(source, args.out, args.lora_alpha)
    elif args.to == "hf":
        convert.write_hf(source, args.out, int(args.max_shard_gb * 1e9), args.lora_alpha)
    else:
        convert.write_sat(source, args.out, args.mp)


def _check(args: argparse.Namespace) -> None:
    if args.to == "hf" and args.mp != 1:
        raise UsageError("--mp belongs to --to sat; Hugging Face files are split by size, with --max-shard-gb")
    if args.to == "sat" and args.only_adapter:
        raise UsageError("--only-adapter belongs to --to hf; a SAT LoRA is saved with its base")
    if args.merge and args.only_adapter:
        raise UsageError("--merge and --only-adapter exclude each other; give one")
    if args.max_shard_gb <= 0:
        raise UsageError(f"--max-shard-gb {args.max_shard_gb}: must be above 0")
