"""Running totals over all ranks for the progress bar; the result itself never depends on them."""

from collections.abc import Sequence

import numpy as np

from cogvlm_hpe.evaluate.summary import ANGLES, IOU_HIT, Row
from launcher.comm import Comm

_FIELDS = ("images", "poses", "valid", "mae", "boxes", "hits")


class Totals:
    """Sums of this rank since the last `reduce`, and of all ranks up to it."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        self._local = np.zeros(len(_FIELDS))
        self._global = np.zeros(len(_FIELDS))

    def add(self, rows: Sequence[Row], images: int) -> None:
        """Count one batch of this rank."""
        errors = [row["errors"] for row in rows if row["task"] == "pose"]
        valid = [sum(error[angle] for angle in ANGLES) / len(ANGLES) for error in errors if error]
        boxes = [row["errors"] for row in rows if row["task"] == "where"]
        hits = sum(error["iou"] >= IOU_HIT for error in boxes if error)
        self._local += [images, len(errors), len(valid), sum(valid), len(boxes), hits]

    def reduce(self, comm: Comm) -> int:
        """All ranks. Add up what is new everywhere; how many images that were."""
        new = comm.sum(self._local)
        self._local = np.zeros(len(_FIELDS))
        self._global = self._global + new
        return int(new[0])

    def text(self) -> str:
        """`MAE 31.2 deg, valid 98 %, grounding 71 %` of what has been asked so far."""
        total = dict(zip(_FIELDS, self._global.tolist(), strict=True))
        parts = []
        if total["poses"]:
            if total["valid"]:
                parts.append(f"MAE {total['mae'] / total['valid']:.1f} deg")
            parts.append(f"valid {total['valid'] / total['poses']:.0%}")
        if total["boxes"]:
            parts.append(f"grounding {total['hits'] / total['boxes']:.0%}")
        return ", ".join(parts)
