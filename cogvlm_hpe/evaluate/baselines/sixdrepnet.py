"""6DRepNet as published (Hempel et al., 6D Rotation Representation for Unconstrained Head Pose Estimation, ICIP 2022).

A RepVGG-B1g2 (Ding et al., CVPR 2021) and a linear layer to six numbers. Its weights file is read as it is, in both
forms: blocks of three branches, as trained, or re-parametrised to one convolution, as shipped. Names of modules are
those of the file. Its matrix R6 and ours: M = S · R6ᵀ · S.

Shapes: H heads, S side of a crop in px.
"""

from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from cogvlm_hpe.evaluate.baselines.crops import CropView
from cogvlm_hpe.evaluate.baselines.judged import CropJudged
from launcher.errors import UserError

CROP_PX = 224
RESIZED_PX = 256
"""What published test code scales a crop to before it cuts the middle 224 px out of it."""

_WIDTHS, _BLOCKS, _LAST_WIDTH = (128, 256, 512), (4, 6, 16), 2048
_GROUPS = 2
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EPS = 1e-8
_SINGULAR = 1e-6


class _Block(nn.Module):
    """3×3, 1×1 and, where the shape stays, identity, each with its batch norm; or `deploy`, all in one convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, deploy: bool) -> None:
        super().__init__()
        if deploy:
            self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups)
            return
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = _conv_norm(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = _conv_norm(inputs, outputs, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return torch.relu(self.rbr_reparam(x))
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return torch.relu(y if self.rbr_identity is None else y + self.rbr_identity(x))


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    pair = nn.Sequential()
    pair.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
    pair.add_module("bn", nn.BatchNorm2d(outputs))
    return pair


class SixDRepNet(nn.Module):
    """Crops to rotations; 39 million parameters as shipped."""

    def __init__(self, deploy: bool) -> None:
        super().__init__()
        number, width = 1, 64
        self.layer0 = _Block(3, width, 2, 1, deploy)
        for stage, (outputs, blocks) in enumerate(zip((*_WIDTHS, _LAST_WIDTH), (*_BLOCKS, 1), strict=True), 1):
            layer = nn.Sequential()
            for block in range(blocks):
                groups = 1 if number % 2 else _GROUPS  # every second block of the whole network
                layer.append(_Block(width, outputs, 1 if block else 2, groups, deploy))
                number, width = number + 1, outputs
            setattr(self, f"layer{stage}", layer)
        self.linear_reg = nn.Linear(_LAST_WIDTH, 6)

    def published(self, pixels: Tensor) -> Tensor:
        """(H, 3, 224, 224) normalised to R6 (H, 3, 3), the matrix of the published code."""
        x = pixels
        for stage in range(5):
            x = self.get_submodule(f"layer{stage}")(x)
        return _matrix(self.linear_reg(x.mean(dim=(2, 3))))

    def forward(self, crops_u8: Tensor) -> Tensor:
        """(H, 3, 256, 256) uint8 to our rotations M (H, 3, 3) float32."""
        edge = (RESIZED_PX - CROP_PX) // 2
        middle = crops_u8[..., edge : edge + CROP_PX, edge : edge + CROP_PX]
        weight = self.linear_reg.weight
        mean, std = (torch.tensor(v, device=weight.device).view(3, 1, 1) for v in (_MEAN, _STD))
        r6 = self.published(((middle / 255.0 - mean) / std).to(weight.dtype)).float()
        flip = torch.tensor([1.0, -1.0, -1.0], device=r6.device)
        return flip[:, None] * r6.transpose(-2, -1) * flip


def _matrix(six: Tensor) -> Tensor:
    """(H, 6) to (H, 3, 3) whose columns are x, z × x and z, where z is at right angles to both given columns."""
    first, second = six[:, :3], six[:, 3:]
    x = first / first.norm(dim=1, keepdim=True).clamp_min(_EPS)
    z = torch.linalg.cross(x, second)
    z = z / z.norm(dim=1, keepdim=True).clamp_min(_EPS)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=2)


def published_angles_deg(r6: Tensor) -> Tensor:
    """R6 (H, 3, 3) to (H, 3) pitch, yaw, roll in degrees, as the published code reads them: yaw within ±90 only.

    Heads seen from behind come out as another triple of the same rotation; `pose_from_rotation` has the full range.
    """
    cos_yaw = torch.sqrt(r6[:, 0, 0] ** 2 + r6[:, 1, 0] ** 2)
    locked = cos_yaw < _SINGULAR
    pitch = torch.where(locked, torch.atan2(-r6[:, 1, 2], r6[:, 1, 1]), torch.atan2(r6[:, 2, 1], r6[:, 2, 2]))
    yaw = torch.atan2(-r6[:, 2, 0], cos_yaw)
    roll = torch.atan2(r6[:, 1, 0], r6[:, 0, 0]).masked_fill(locked, 0.0)
    return torch.rad2deg(torch.stack([pitch, yaw, roll], dim=1))


def is_sixdrepnet(path: Path) -> bool:
    """Whether a path can be such a weights file: one file of torch's."""
    return Path(path).is_file() and Path(path).suffix in (".pth", ".tar", ".pt")


def load_sixdrepnet(path: Path, device: str = "cpu") -> SixDRepNet:
    """Read a weights file of 6DRepNet, in evaluation mode; nothing in it is run. Raises UserError."""
    try:
        # Files of torch < 1.6 are no zip archives, and cannot be mapped.
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a file that is not its own
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a weights file that torch reads safely ({said[:120]})") from None
    state = _state(value)
    model = SixDRepNet(deploy=any(".rbr_reparam." in name for name in state))
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name]]
    wrong += [name for name in state if name not in wanted]
    if wrong:
        raise UserError(
            f"{path}: not 6DRepNet with RepVGG-B1g2: {len(wrong)} tensors differ, the first {wrong[0]}; "
            "give the weights file of its authors"
        )
    model.load_state_dict(state)
    return model.to(device).eval()


def load_judged(path: Path, device: str = "cpu") -> CropJudged:
    """The network as the evaluator takes it: head boxes are its crops, as loose as the labels are. Raises UserError."""
    return CropJudged(load_sixdrepnet(path, device), CropView(RESIZED_PX, margin=0.0))


def _state(value: object) -> dict[str, Tensor]:
    """The tensors by name, wherever in the file: as they are, or in a training snapshot, perhaps of DataParallel."""
    for key in ("model_state_dict", "state_dict"):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
    if not isinstance(value, Mapping):
        return {}
    tensors = {str(k).removeprefix("module."): v for k, v in value.items() if isinstance(v, Tensor)}
    # Left in the file by the conversion to one convolution; holds nothing that is learned.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("id_tensor")}
