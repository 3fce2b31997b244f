"""`cogvlm-hpe demo`: the whole flow at laptop size, as a list of the commands a user would type."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from cogvlm_hpe import stages
from cogvlm_hpe.stages import Stage

HELP = "the whole flow at laptop size: shards, training, merge, evaluation, report"
_SETS = {
    "a-train": ("A", "train"),
    "a-val": ("A", "val"),
    "a-test": ("A", "test"),
    "b-test": ("B", "test"),
}
_ABOUT = Path(__file__).with_suffix(".yaml")
_JUDGED_ON = ("a-test", "b-test")
SYSTEMS = ("base", "lora", "merged")
MERGE_QUANTILE = "0.05"
"""Of the layers' similarities: ours, for a model with few layers, where one that goes back to the base is felt."""


@dataclass(frozen=True)
class Sizes:
    """Scenes of each set and steps of training; kept beside the results, which are only valid for them."""

    train_scenes: int = 2400
    val_scenes: int = 100
    test_scenes: int = 150
    max_steps: int = 900
    seed: int = 1

    def scenes(self, name: str) -> int:
        """Scenes of the set called `name`."""
        return {"train": self.train_scenes, "val": self.val_scenes, "test": self.test_scenes}[_SETS[name][1]]


QUICK = Sizes(train_scenes=48, val_scenes=8, test_scenes=12, max_steps=6)
"""Seconds of work: shows that everything runs, teaches nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the demo."""
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where it goes (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not whether it learns")


def run(args: argparse.Namespace) -> int:
    """Run the stages that are not finished. Raises UserError where one fails."""
    sizes = QUICK if args.quick else Sizes()
    stages.keep_settings(args.dir / "demo.json", {"sizes": asdict(sizes), "nproc": args.nproc})
    return stages.run_all(plan(args.dir, sizes, args.nproc), args.dir)


def plan(folder: Path, sizes: Sizes, nproc: int) -> list[Stage]:
    """All stages in order."""
    base, lora, merged = folder / "base", folder / "lora", folder / "merged"
    sets = {name: folder / "shards" / name for name in _SETS}
    mix = [entry | {"path": str(sets[Path(entry["path"]).name])} for entry in stages.lora_mix()]
    systems = dict(zip(SYSTEMS, (None, lora / "last", merged), strict=True))
    return [
        *(stages.shards(sets[name], *_SETS[name], sizes.scenes(name), sizes.seed, nproc) for name in _SETS),
        stages.base(base),
        stages.lora("train", base, lora, mix, sizes.max_steps, nproc),
        Stage(
            "merge",
            merged,
            stages.program("cogvlm_hpe", "merge", "--base", base, "--adapter", lora / "last")
            + ["--method", "layerwise", "--quantile", MERGE_QUANTILE, "--out", str(merged)],
        ),
        *(stages.evaluate(base, systems, sets[on], folder / "evaluation" / on, nproc) for on in _JUDGED_ON),
        Stage(
            "report",
            folder / "report.html",
            stages.program("cogvlm_hpe", "report", *(folder / "evaluation" / on for on in _JUDGED_ON))
            + ["--systems", str(_ABOUT), "--out", str(folder), "--card", str(merged)],
        ),
    ]
