"""What a run will need, before it is started: memory of a GPU by part, FLOPs of a step, sizes, rates.

The model is traced on the meta device in its true shapes: nothing is allocated, nothing is estimated by a formula for
a model that has since changed. What a step saves for its backward pass is counted as autograd saves it, and FLOPs as
the operators are called; attention counts whole squares, causal or not.

Shapes: I images of a micro-batch, R questions, L tokens of a question and its answer.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cogvlm_hpe.config import RunConfig
from cogvlm_hpe.model.attention import causal
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.experts import DecoderLayer
from cogvlm_hpe.model.layout import IGNORE
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.vision import VisionLayer

_ADAM_BYTES = 12  # float32 master and two moments
_RESERVED = 3e9  # CUDA context, libraries and fragmentation: an assumption


@dataclass(frozen=True)
class Trace:
    """One micro-batch of one rank, in bytes and FLOPs."""

    weights: int
    """All parameters, adapter included."""
    trained: int
    """Number of trained parameters."""
    largest_layer: int
    saved_in_layers: int
    """What decoder and vision layers keep for the backward pass."""
    saved_elsewhere: int
    largest_saved: int
    """Of one layer: what recomputing it needs."""
    layer_inputs: int
    """What recomputing starts from."""
    forward_flops: int
    backward_flops: int
    recomputed_flops: int


@dataclass(frozen=True)
class Plan:
    """Per GPU, for a number of GPUs. Bytes; FLOPs of one global step over all GPUs, recomputation included."""

    gpus: int
    memory: dict[str, float] = field(default_factory=dict)
    step_flops: float = 0.0
    useful_flops: float = 0.0
    """Without what is recomputed: what MFU counts."""

    @property
    def total(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory.values())


def trace(config: RunConfig, model_config: CogVLMConfig, questions: int, tokens: int) -> Trace:
    """Trace a micro-batch of `config`, `questions` an image, each of `tokens` with its answer, on the meta device."""
    from cogvlm_hpe.train.adapter import add_lora

    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    with torch.device("meta"), _default_dtype(dtype):
        model = CogVLMForCausalLM(model_config).train()
        if config.adapter is not None:
            add_lora(model, config.adapter, config.model.base)
    model.to(dtype)
    saved, flops = _Saved(model), _Flops(model)
    with _flash(), flops.counter:
        with saved.hooks():
            loss = model(**_batch(config.train.micro_batch, questions, tokens, model_config, dtype)).loss
        flops.mark_forward()
        loss.backward()
    layers = [layer for layer in model.modules() if isinstance(layer, DecoderLayer | VisionLayer)]
    return Trace(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest_layer=max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers),
        saved_in_layers=saved.bytes.total() - saved.bytes[None],
        saved_elsewhere=saved.bytes[None],
        largest_saved=max((n for name, n in saved.bytes.items() if name is not None), default=0),
        layer_inputs=saved.layer_inputs,
        forward_flops=flops.forward,
        backward_flops=flops.counter.get_total_flops() - flops.forward,
        recomputed_flops=flops.in_layers,
    )


def plan(config: RunConfig, traced: Trace, gpus: int) -> Plan:
    """Memory and FLOPs on so many GPUs. The global batch stays; ranks get their share of it."""
    train, recompute = config.train, config.train.gradient_checkpointing
    bytes_each = 2 if config.model.dtype == "bf16" else 4
    stage, trained = train.zero_stage, traced.trained
    weights = traced.weights / (gpus if stage == 3 else 1)
    master_free = stage == 0 and config.model.dtype == "fp32"
    optimizer = trained * (_ADAM_BYTES - 4 if master_free else _ADAM_BYTES) / (gpus if stage >= 1 else 1)
    gradients = trained * bytes_each / (gpus if stage >= 2 else 1)
    kept = traced.layer_inputs + traced.largest_saved if recompute else traced.saved_in_layers
    memory = {
        "weights": weights,
        "gathered layers": 2.0 * traced.largest_layer if stage == 3 and gpus > 1 else 0.0,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": float(kept + traced.saved_elsewhere),
        "reserved": _RESERVED,
    }
    micro_batches = ceil(config.shards.batch / train.micro_batch)
    useful = micro_batches * (traced.forward_flops + traced.backward_flops)
    extra = micro_batches * traced.recomputed_flops if recompute else 0
    return Plan(gpus, memory, float(useful + extra), float(useful))


def _batch(images: int, questions: int, tokens: int, config: CogVLMConfig, dtype: torch.dtype) -> dict[str, Any]:
    side = (config.vision_config or {})["image_size"]
    ids = torch.zeros(images * questions, tokens, dtype=torch.long)
    labels = torch.where(torch.arange(tokens) < tokens - max(1, tokens // 4), IGNORE, ids)
    return {
        "pixel_values": torch.empty(images, 3, side, side, dtype=dtype, device="meta"),
        "image_index": torch.arange(images).repeat_interleave(questions),
        "branch_input_ids": ids,
        "branch_labels": labels,
    }


class _Saved:
    """Bytes that autograd keeps, each storage once, by the layer that kept it (None: outside of layers)."""

    def __init__(self, model: CogVLMForCausalLM) -> None:
        self.bytes: Counter[str | None] = Counter()
        self.layer_inputs = 0
        self._seen: dict[int, Any] = {p.untyped_storage()._cdata: p for p in model.parameters()}
        self._inputs: dict[int, Any] = {}
        self._inside: str | None = None
        for name, layer in model.named_modules():
            if isinstance(layer, DecoderLayer | VisionLayer):
                layer.register_forward_pre_hook(self._enter(name))
                layer.register_forward_hook(self._leave)

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While these are set, what is saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, so that its address is not used again
            self.bytes[self._inside] += storage.nbytes()
        return tensor

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(layer: Any, given: tuple[Any, ...]) -> None:
            self._inside = name
            if not torch.is_grad_enabled():
                return
            self._count_input(given[0])
            if isinstance(layer, DecoderLayer):
                mask = getattr(getattr(given[3], "kernel", None), "seen", None)
                for tensor in (*given[1], mask):
                    if tensor is not None:
                        self._count_input(tensor)

        return hook

    def _leave(self, layer: Any, given: tuple[Any, ...], output: Any) -> None:
        self._inside = None
        if isinstance(layer, DecoderLayer) and given[3] is causal:
            for tensor in output[1:]:  # a prefix's keys and values: what branch layers start from
                self._count_input(tensor)

    def _count_input(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._inputs:
            self._inputs[storage._cdata] = storage
            self.layer_inputs += storage.nbytes()


class _Flops:
    """FLOPs of the forward pass, and of those of its layers that the backward pass would recompute."""

    def __init__(self, model: CogVLMForCausalLM) -> None:
        self.counter = flop_counter()
        self.forward = self.in_layers = 0
        self._at_entry = 0
        for layer in model.modules():
            if isinstance(layer, DecoderLayer | VisionLayer):
                layer.register_forward_pre_hook(self._enter)
                layer.register_forward_hook(self._leave)

    def mark_forward(self) -> None:
        """The forward pass is over."""
        self.forward = self.counter.get_total_flops()

    def _enter(self, *_: Any) -> None:
        self._at_entry = self.counter.get_total_flops()

    def _leave(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.in_layers += self.counter.get_total_flops() - self._at_entry


def flop_counter() -> FlopCounterMode:
    """torch's counter, which also knows the attention kernel of CPUs."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={flash: _attention_flops, back: _attention_backward_flops})


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return int(4 * batch * heads * queries * k[2] * width)


def _attention_backward_flops(_grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    # Scores again, and the gradients of values, scores, queries and keys: five products to the forward's two.
    return _attention_flops(q, k, v) * 5 // 2


@contextmanager
def _flash() -> Iterator[None]:
    """Meta tensors take SDPA's plain path, which keeps L x L scores that no real device keeps: take the fused one."""
    plain = F.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
