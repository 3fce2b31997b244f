"""ZeRO-3: a base that no rank ever holds whole, and of which each rank reads only its part.

DeepSpeed keeps of a parameter one piece on each rank: the flattened tensor, padded at its end to a multiple of the
ranks, cut in equal pieces in rank order. The rest is gathered layer by layer when it is needed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cogvlm_hpe.model.load import check_tensors, empty_model
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.weights import Weights


def load_partitioned(weights: Weights, dtype: torch.dtype, deepspeed_config: dict[str, Any]) -> CogVLMForCausalLM:
    """All ranks. The base split over the ranks, in evaluation mode; a rank reads its pieces and nothing else.

    Only where DeepSpeed makes more of a tensor than pieces, as it splits it, a rank reads all of it. `deepspeed_config`
    is the one the engine will get. Memory beside the pieces: one whole tensor at a time.
    Raises UserError where the folder does not hold exactly the model's tensors.
    """
    model = empty_model(weights.config, dtype)
    check_tensors(weights, model)
    split, whole = _Splitter(dtype, deepspeed_config), _needs_whole(deepspeed_config["zero_optimization"])
    for name, like in list(model.named_parameters()):
        values = torch.empty(like.shape, dtype=dtype, device=rank_device())
        parameter = nn.Parameter(values.copy_(weights.read(name)) if whole else values)
        split(parameter)
        if not whole:
            set_piece(parameter, weights.flat(name, *piece(parameter)))
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, parameter)
    return model


def _needs_whole(zero: dict[str, Any]) -> bool:
    """Whether a copy is made at once: the larger piece that hpZ keeps on each machine, or one on a disk."""
    on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
    return on_disk or zero.get("zero_hpz_partition_size", 1) > 1


def rank_device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_split(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has cut this parameter in pieces."""
    return hasattr(parameter, "ds_tensor")


def piece(parameter: nn.Parameter) -> tuple[int, int]:
    """Which elements of the flattened parameter this rank holds: [start, stop), without padding."""
    length = parameter.ds_tensor.numel()
    start = min(parameter.ds_zero_partition_rank * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


def own_piece(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's piece of a value for the whole parameter, its padding as zeros."""
    start, stop = piece(parameter)
    values = whole.flatten()[start:stop]
    return torch.cat([values, values.new_zeros(parameter.ds_tensor.numel() - len(values))])


@torch.no_grad()
def set_piece(parameter: nn.Parameter, values: Tensor) -> None:
    """Write this rank's piece, its padding as zeros."""
    parameter.ds_tensor[: len(values)].copy_(values)
    parameter.ds_tensor[len(values) :].zero_()


class _Splitter:
    """Hands a parameter to DeepSpeed; the first one makes DeepSpeed's context, which the others share."""

    def __init__(self, dtype: torch.dtype, deepspeed_config: dict[str, Any]) -> None:
        self._dtype, self._config = dtype, deepspeed_config
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        import deepspeed

        if self._first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=self._config, dtype=self._dtype
            )
            self._first = parameter
        else:
            self._first.convert_to_zero_parameters(param_list=[parameter])
