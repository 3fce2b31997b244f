"""A convolutional network on head crops that gives a rotation: the kind of model that 6DRepNet stands for.

A ResNet or ConvNeXt of transformers, six numbers, and the rotation they span by Gram-Schmidt (Zhou et al., On the
Continuity of Rotation Representations, CVPR 2019); trained on the geodesic distance, as 6DRepNet (arXiv 2202.12555).

Shapes: H heads, S side of a crop in px.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cogvlm_hpe.evaluate.baselines.crops import CropView
from cogvlm_hpe.evaluate.baselines.judged import CropJudged
from launcher.errors import UserError
from launcher.files import atomic_folder, write_json_atomic

CONFIG_FILE = "cnn.json"
WEIGHTS_FILE = "model.safetensors"
_EPS = 1e-4


@dataclass(frozen=True)
class CNNConfig:
    """What the network is and what it sees. The default has 0.6 million parameters.

    Args:
        backbone: transformers' ResNet (basic blocks) or ConvNeXt
        widths: channels of each stage
        depths: blocks of each stage
        crop_px: side of a head's crop
        margin: what is added to each side of the box, in sides
    """

    backbone: Literal["resnet", "convnext"] = "resnet"
    widths: tuple[int, ...] = (32, 64, 96, 160)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    crop_px: int = 64
    margin: float = 0.2


class PoseCNN(nn.Module):
    """Crops to rotations."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _backbone(config)
        self.head = nn.Linear(config.widths[-1], 6)

    def forward(self, crops_u8: Tensor) -> Tensor:
        """(H, 3, S, S) uint8 to rotations M (H, 3, 3) float32."""
        pixels = (crops_u8.to(self.head.weight.dtype) / 255.0 - 0.5) / 0.25
        features = self.backbone(pixels).pooler_output.flatten(1)
        return rotation_from_6d(self.head(features).float())


def _backbone(config: CNNConfig) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

    shape = {"hidden_sizes": list(config.widths), "depths": list(config.depths)}
    if config.backbone == "convnext":
        return ConvNextModel(ConvNextConfig(**shape, num_stages=len(config.widths), patch_size=4))
    return ResNetModel(ResNetConfig(**shape, embedding_size=config.widths[0], layer_type="basic"))


def rotation_from_6d(columns: Tensor) -> Tensor:
    """(…, 6), the first two columns of a matrix one after the other, to (…, 3, 3)."""
    first, second = columns[..., :3], columns[..., 3:]
    x = F.normalize(first, dim=-1)
    y = F.normalize(second - (x * second).sum(dim=-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-1)


def geodesic_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """(H, 3, 3) twice to the angles (H,) in radians between them; the gradient stays finite at 0 and at a half turn."""
    cosine = ((predicted * truth).sum(dim=(-2, -1)) - 1.0) / 2.0
    return torch.acos(cosine.clamp(-1.0 + _EPS, 1.0 - _EPS))


@dataclass(frozen=True)
class SavedCNN:
    """A network with what its folder says of its training."""

    model: PoseCNN
    notes: dict[str, Any] = field(default_factory=dict)


def save_cnn(folder: Path, model: PoseCNN, notes: dict[str, Any]) -> None:
    """Write a folder, complete or not there."""
    with atomic_folder(folder) as work:
        save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, work / WEIGHTS_FILE)
        write_json_atomic(work / CONFIG_FILE, {"config": asdict(model.config), "notes": notes})


def is_cnn(folder: Path) -> bool:
    """Whether a folder holds such a network."""
    return (Path(folder) / CONFIG_FILE).is_file()


def load_cnn(folder: Path, device: str = "cpu") -> SavedCNN:
    """Read a folder, in evaluation mode. Raises UserError."""
    try:
        value = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["config"].items()}
        model = PoseCNN(CNNConfig(**shape))
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no crop network there ({Path(str(error.filename)).name} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: the crop network cannot be read ({said}); train it again") from None
    return SavedCNN(model.to(device).eval(), value.get("notes", {}))


def load_judged(folder: Path, device: str = "cpu") -> CropJudged:
    """The network as the evaluator takes it. Raises UserError."""
    model = load_cnn(folder, device).model
    return CropJudged(model, CropView(model.config.crop_px, model.config.margin))
