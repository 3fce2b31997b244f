"""`cogvlm-hpe label`: poses that a model gives to the heads of a shard set, written as a new set of weak labels.

The paper (HPE-CogVLM, arXiv 2406.01914) pre-trains on such labels: crowds with head boxes, poses by a crop network.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cogvlm_hpe.evaluate.command import DTYPES, DTYPES_HELP
from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    import numpy as np

    from shards.index import ShardSet
    from shards.record import Record
    from shards.write import Sample

HELP = "give the heads of a shard set the poses that a model predicts, as weak labels"
_EPILOG = """under mpirun ranks share the work:
  mpirun -np 4 cogvlm-hpe label DIR --with cnn:runs/cnn --out DIR
A crop network's confidence is how well it agrees with itself on the mirrored crop: 1 for the same pose, 0 for poses 90
degrees apart. A language model's is that of expectation decoding. Heads it gives no pose to, or one of too little
confidence, stay without; hpe-shards info tells how many of the new set's heads have one."""
_KINDS = ("cnn", "cogvlm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of label."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("set", type=Path, metavar="DIR", help="shard set whose heads are to be labelled")
    add(
        "--with", dest="labeller", required=True, metavar="cnn:DIR|cogvlm:DIR",
        help="a crop network (train-cnn), or a base, adapter or merged model",
    )  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new set")
    add("--relabel", action="store_true", help="also heads that have a pose already, which is lost")
    add("--min-confidence", type=float, default=0.0, metavar="C", help="leave out poses below it (default: keep all)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help=f"of cogvlm; {DTYPES_HELP}")


def run(args: argparse.Namespace) -> int:
    """All ranks. Build the new set. Raises UserError or UsageError for the user's mistakes."""
    kind, _, folder = args.labeller.partition(":")
    if kind not in _KINDS or not folder:
        raise UsageError(f"--with {args.labeller}: must be cnn:DIR or cogvlm:DIR")
    if kind == "cnn" and args.dtype != "auto":
        raise UsageError(f"--dtype {args.dtype}: is of cogvlm:DIR; a crop network is fp32 always, leave it out")
    if not 0.0 <= args.min_confidence <= 1.0:
        raise UsageError(f"--min-confidence {args.min_confidence}: must lie in 0..1")

    from cogvlm_hpe.evaluate.command import device_of
    from launcher import comm as comms
    from shards.index import open_set
    from shards.write import build

    comm, device = comms.mpi(), device_of(args.device)
    labeller: Labeller = _Crops(Path(folder), device) if kind == "cnn" else _Answers(Path(folder), device, args.dtype)
    source = Labelled(open_set(args.set), labeller, args.labeller, args.relabel, args.min_confidence)
    build(source, args.out, comm)
    return 0


class Labeller(Protocol):
    """Poses for boxes: for each a rotation (3, 3) with a confidence in 0..1, or None where there is no valid answer."""

    def __call__(
        self, pixels: "np.ndarray", boxes: list[tuple[float, float, float, float]]
    ) -> "list[tuple[np.ndarray, float] | None]": ...


@dataclass(frozen=True)
class Labelled:
    """A source: the samples of a set, their heads with weak labels."""

    given: "ShardSet"
    labeller: Labeller
    labeller_name: str
    relabel: bool = False
    min_confidence: float = 0.0

    @property
    def name(self) -> str:
        """As the set it is made of."""
        return f"{self.given.info['source']}-labelled"

    @property
    def licence(self) -> str:
        """As the set it is made of."""
        return str(self.given.info["licence"])

    @property
    def split(self) -> str:
        """As the set it is made of."""
        return str(self.given.info["split"])

    @property
    def scope(self) -> Mapping[str, Any]:
        """What the labels depend on."""
        return {
            "of": self.given.info["scope"],
            "labelled_with": self.labeller_name,
            "relabel": self.relabel,
            "min_confidence": self.min_confidence,
        }

    def __len__(self) -> int:
        return len(self.given)

    def sample(self, i: int) -> "Sample":
        """Sample `i` of the set with its heads labelled. Raises UserError where it cannot be read."""
        from shards.write import Sample

        stored = self.given.read(i)
        known = self.given.parse(i, stored.json)
        pixels = self.given.pixels(i, stored, known)
        return Sample(stored.key, stored.image, stored.extension, self.labelled(known, pixels))  # type: ignore[arg-type]

    def labelled(self, known: "Record", pixels: "np.ndarray") -> "Record":
        """The record with weak poses; heads asked about without a good enough answer have none."""
        asked = [n for n, head in enumerate(known.heads) if head.rotation is None or self.relabel]
        found = self.labeller(pixels, [known.heads[n].bbox for n in asked]) if asked else []
        heads = list(known.heads)
        for number, answer in zip(asked, found, strict=True):
            if answer is not None and answer[1] >= self.min_confidence:
                rotation = tuple(answer[0].reshape(9).tolist())
                heads[number] = replace(heads[number], rotation=rotation, weak=True, confidence=answer[1])
            elif self.relabel:  # a true label left there would pass for one of the labeller's, of confidence 1
                heads[number] = replace(heads[number], rotation=None, weak=False, confidence=1.0)
        return replace(known, heads=heads)


class _Crops:
    """A crop network."""

    def __init__(self, folder: Path, device: str) -> None:
        from cogvlm_hpe.evaluate.baselines.cnn import load_judged

        judged = load_judged(folder, device)
        self.network, self.view, self.device = judged.network, judged.view, device

    def __call__(
        self, pixels: "np.ndarray", boxes: list[tuple[float, float, float, float]]
    ) -> "list[tuple[np.ndarray, float] | None]":
        import torch

        from cogvlm_hpe.evaluate.baselines.crops import head_crops
        from shards.pose import flip_rotation, geodesic_deg

        crops = head_crops(pixels, boxes, self.view.size_px, self.view.margin).to(self.device)
        with torch.no_grad():
            found = self.network(torch.cat([crops, crops.flip(-1)])).cpu().double().numpy()
        straight, mirrored = found[: len(boxes)], flip_rotation(found[len(boxes) :])
        agreement = (1.0 - geodesic_deg(straight, mirrored) / 90.0).clip(0.0, 1.0)
        return list(zip(straight, agreement.tolist(), strict=True))


class _Answers:
    """A language model, by expectation decoding."""

    def __init__(self, folder: Path, device: str, dtype: str = "auto") -> None:
        from cogvlm_hpe.evaluate.command import dtype_of
        from cogvlm_hpe.model.load import DTYPES, load

        self.loaded = load(folder, device=device, dtype=DTYPES[dtype_of(dtype, device)])
        if self.loaded.notes["answer_format"] != "offset":
            raise UserError(f"{folder}: answers in signed form have no confidence; label with another model")

    def __call__(
        self, pixels: "np.ndarray", boxes: list[tuple[float, float, float, float]]
    ) -> "list[tuple[np.ndarray, float] | None]":
        from cogvlm_hpe.headpose import HeadPose
        from shards.pose import rotation_from_pose

        return [
            None
            if a.yaw is None or a.pitch is None or a.roll is None
            else (rotation_from_pose(a.yaw, a.pitch, a.roll), 1.0 if a.confidence is None else a.confidence)
            for a in HeadPose(self.loaded, "expectation")(pixels, boxes)
        ]
