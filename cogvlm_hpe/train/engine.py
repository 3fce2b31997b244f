"""DeepSpeed around the model: one optimizer step over a global batch, and state by parameter name.

DeepSpeed's own checkpoints are tied to the number of ranks and to `latest`; here the state is read and set as whole
float32 tensors by name, so that any world size and any ZeRO stage can go on from it.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from cogvlm_hpe.config import RunConfig, TrainConfig
from cogvlm_hpe.model.load import DTYPES
from cogvlm_hpe.train.adapter import trainable
from cogvlm_hpe.train.muon import Muon
from cogvlm_hpe.train.partition import is_split, own_piece, rank_device
from launcher.comm import Comm
from launcher.errors import UsageError, UserError

T = TypeVar("T")
SPLIT_BUCKET = 250_000_000
"""Elements of stage 3's bucket of gradients, which are float32: as many bytes as DeepSpeed's default of 5e8 in bf16."""
_ADAM_STATE = ("exp_avg", "exp_avg_sq")


def prepare_deepspeed() -> None:
    """Before DeepSpeed is first imported: on a machine without CUDA, keep it from compiling its CPU op.

    The op (shared-memory all-reduce) takes minutes to build and a killed build leaves a lock on which every later
    run hangs; gloo does the same work. Losses are the same with and without it. Torch is kept from warning users of
    the old names that DeepSpeed calls it by. Raises UsageError where DeepSpeed would leave this rank's GPU alone.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    if torch.cuda.is_available():
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            raise UsageError(
                "DS_ACCELERATOR=cpu: DeepSpeed would train on the CPU beside a GPU; unset it, or hide the GPUs "
                "(CUDA_VISIBLE_DEVICES=)"
            )
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def make_optimizer(parameters: dict[str, nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW, over named parameters."""
    if train.optimizer == "muon":
        return Muon(parameters, train.lr, train.betas, train.weight_decay)
    # One group: with several, DeepSpeed 0.19.8 links only the first one's Adam state to its parameters under ZeRO.
    return torch.optim.AdamW(parameters.values(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)


def check_zero(config: RunConfig) -> None:
    """Raises UsageError where train.deepspeed holds what DeepSpeed's ZeRO does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**deepspeed_config(config, 1)["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"train.deepspeed.zero_optimization.{key}: {first['msg']}") from None


def deepspeed_config(config: RunConfig, accumulation: int) -> dict[str, Any]:
    """What DeepSpeed is told, by the engine and by a base that is split before there is one."""
    train, bf16 = config.train, config.model.dtype == "bf16"
    # Sums of many bf16 gradients lose the small ones. At stage 1 DeepSpeed would take another optimizer for it.
    sums: dict[str, Any] = {"communication_data_type": "fp32"} if bf16 else {}
    sums |= {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and train.zero_stage > 1 else {}
    zero = {"reduce_bucket_size": SPLIT_BUCKET} if train.zero_stage == 3 else {}
    return {
        **sums,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload too it is torch's AdamW, whose state we know how to read
        "steps_per_print": 10**9,  # what is worth saying goes through our own monitor
        **train.deepspeed,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {**zero, **train.deepspeed.get("zero_optimization", {}), "stage": train.zero_stage},
    }


class Engine:
    """The trained module and its optimizer under ZeRO."""

    def __init__(self, module: nn.Module, config: RunConfig, comm: Comm, accumulation: int) -> None:
        import deepspeed

        self.comm = comm
        self.parameters = trainable(module)
        _leave_frozen_alone(module)
        _bring_to_working_form(module.parameters(), config)
        self._extremes: list[Tensor] = []
        self._plain_norm: Tensor | None = None
        for parameter in self.parameters.values():
            parameter.register_hook(self._look)
        train = config.train
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(self.parameters, train),
            config=deepspeed_config(config, accumulation),
            dist_init_required=False,
        )

    def inside(self, work: Callable[[], T]) -> T:
        """All ranks. The result of `work`, which uses the model without gradients.

        Under ZeRO-3 weights that one module takes from another are found only inside the engine's own forward.
        """
        with torch.no_grad():
            result: T = self.engine(work)
        return result

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's part of the loss.

        The caller has scaled it so that the *sum* over ranks and micro-batches is the global loss times the number
        of ranks: DeepSpeed then averages over ranks and nothing else.
        """
        self.engine.backward(loss, scale_wrt_gas=False)

    def finite(self) -> Tensor | bool:
        """Whether this rank's gradients since the last call are finite, as they were before ranks added them up."""
        seen, self._extremes = self._extremes, []
        return torch.stack(seen).isfinite().all() if seen else True

    def _look(self, gradient: Tensor) -> None:
        # One pass, in which NaN wins over every number; isfinite makes five.
        self._extremes += torch.aminmax(gradient)

    def step(self) -> None:
        """End a micro-batch; at the last one of a step, clip and update. Raises UserError on a non-finite gradient.

        DeepSpeed skips such a step without a word, on all ranks alike, so no weight has changed.
        """
        skipped = self.engine.skipped_steps
        if not self.engine.zero_optimization() and self.engine.is_gradient_accumulation_boundary():
            # Of stage 0 DeepSpeed does not tell it.
            self._plain_norm = get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        self.engine.step()
        if self.engine.skipped_steps != skipped:
            raise UserError(
                "the gradient is not finite, no weight was changed; look at the last samples, lower train.lr, and "
                "resume from the last checkpoint"
            )

    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping; nan before the first one."""
        norm = self.engine.get_global_grad_norm() if self._plain_norm is None else self._plain_norm
        return float("nan") if norm is None else float(norm)

    def weights(self) -> dict[str, Tensor]:
        """All ranks. Trained parameters as whole float32 tensors on the CPU, by name; rank 0 has them, others none."""
        return self._gathered((name, p, None) for name, p in self.parameters.items())

    def optimizer_state(self) -> dict[str, Tensor]:
        """All ranks. Adam's moments by `name/key`, and the count of its steps; rank 0 has them, others none."""
        kept = ((f"{n}/{key}", p, key) for n, p in self.parameters.items() for key in self._keys(p))
        steps = {"adam_step": torch.tensor(float(self._adam_steps()[0]))} if self.comm.rank == 0 else {}
        return self._gathered(kept) | steps

    def _gathered(self, wanted: Iterable[tuple[str, nn.Parameter, str | None]]) -> dict[str, Tensor]:
        # Of a whole model this is twelve bytes a parameter: too much for every rank of a machine.
        out = {}
        for name, parameter, key in wanted:
            value = self._full(parameter, key)
            if self.comm.rank == 0:
                out[name] = value.detach().to("cpu", torch.float32, copy=True).reshape(self._shape(parameter))
        return out

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """All ranks. Take over a saved state; Adam must have made its own before (one step at rate 0).

        The module's working weights were loaded before the engine was made; masters may hold more digits.
        """
        for name, parameter in self.parameters.items():
            self._set(parameter, weights[name], None)
            for key in self._keys(parameter):
                self._set(parameter, state[f"{name}/{key}"], key)
        for counter in self._adam_steps():
            counter.fill_(float(state["adam_step"]))

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain(parameter):
            return parameter if key is None else self.engine.optimizer.state[parameter][key]
        if key is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(parameter.device)
        if self._is_plain(parameter):
            target = parameter.data if key is None else self.engine.optimizer.state[parameter][key]
            target.copy_(value)
        elif is_split(parameter):
            # Not the whole one: DeepSpeed 0.19.8 cuts that without the padding of the last rank's piece.
            own = own_piece(parameter, value)
            if key is None:
                safe_set_local_fp32_param(parameter, own)
            else:
                safe_set_local_optimizer_state(parameter, own, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _keys(self, parameter: nn.Parameter) -> list[str]:
        """Names of a parameter's moments: Muon keeps no second one of a matrix."""
        kept = self.engine.optimizer.state[parameter] if self._is_plain(parameter) else _ADAM_STATE
        return [key for key in _ADAM_STATE if key in kept]

    def _is_plain(self, parameter: nn.Parameter) -> bool:
        return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")

    def _shape(self, parameter: nn.Parameter) -> Sequence[int]:
        return getattr(parameter, "ds_shape", parameter.shape)

    def _adam_steps(self) -> list[Tensor]:
        optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        return [state["step"] for state in optimizer.state.values() if "step" in state]


def _leave_frozen_alone(module: nn.Module) -> None:
    """Keep DeepSpeed from sending rank 0's frozen weights to all ranks: each has read the same files itself.

    Besides the time, the write would turn a mapped base, which a machine's ranks share, into a copy for each of them.
    """
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.ds_optim_param = True  # what DeepSpeed's broadcast looks for


def _bring_to_working_form(parameters: Iterable[nn.Parameter], config: RunConfig) -> None:
    """Beside a base that is split already DeepSpeed neither casts nor moves what came after it: adapters, read-outs."""
    if config.train.zero_stage == 3:
        for parameter in parameters:
            if not is_split(parameter):
                parameter.data = parameter.data.to(rank_device(), DTYPES[config.model.dtype])
