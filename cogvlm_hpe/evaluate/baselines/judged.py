"""Crop networks before the judge: the same heads, records and scores as for a language model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cogvlm_hpe import dialogue
from cogvlm_hpe.evaluate.answer import Answer
from cogvlm_hpe.evaluate.summary import Row
from shards import pose

if TYPE_CHECKING:
    import torch

    from cogvlm_hpe.evaluate.baselines.crops import CropView
    from shards.stream import Item


@dataclass
class CropJudged:
    """A network from crops (heads, 3, S, S) uint8 to rotations (heads, 3, 3), asked about poses and nothing else."""

    network: "torch.nn.Module"
    view: "CropView"
    notes: dict[str, Any] = field(
        default_factory=lambda: {"prompts": dict(dialogue.DEFAULT_PROMPTS), "answer_format": "offset"}
    )

    def answers(self, items: "Sequence[Item]", asked: Sequence[tuple[int, Row]]) -> list[Answer]:
        """One answer for each (image, row); the text is the pose in whole degrees, the pose itself is exact."""
        import torch

        device = next(self.network.parameters()).device
        crops = [items[image].image[int(row["id"].rpartition("-")[2])] for image, row in asked]  # type: ignore[index]
        with torch.no_grad():
            rotations = self.network(torch.stack(crops).to(device)).cpu().double().numpy()
        out = []
        for yaw, pitch, roll in pose.pose_from_rotation(rotations).tolist():
            out.append(Answer(dialogue.format_pose(yaw, pitch, roll), (yaw, pitch, roll)))
        return out
