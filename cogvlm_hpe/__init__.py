"""HPE-CogVLM: a vision language model that reads head pose."""

from typing import TYPE_CHECKING, Any

from cogvlm_hpe import model as model  # makes the model known to transformers' Auto classes

if TYPE_CHECKING:
    from cogvlm_hpe.headpose import HeadPose as HeadPose

__all__ = ["HeadPose"]


def __getattr__(name: str) -> Any:
    # Late: importing a part of the package must not import torch.
    if name == "HeadPose":
        from cogvlm_hpe.headpose import HeadPose

        return HeadPose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
