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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cogvlm_hpe.config import RunConfig, TrainConfig
from cogvlm_hpe.model.attention import causal
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.experts import DecoderLayer
from cogvlm_hpe.model.layout import IGNORE
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.vision import VisionLayer
from cogvlm_hpe.train.engine import SPLIT_BUCKET
from cogvlm_hpe.train.muon import is_matrix

_RESERVED = 3e9  # CUDA context, libraries and fragmentation: an assumption
_QUESTION_TOKENS = 64  # more than any of the packaged prompts has


@dataclass(frozen=True)
class Trace:
    """One micro-batch of one rank, in bytes and FLOPs."""

    element_bytes: int
    sizes: tuple[int, ...]
    """Elements of every parameter, adapters included."""
    trained: int
    """Number of trained parameters."""
    stacked: int
    """Elements of the adapter that a run stands on, which its checkpoints hold too."""
    moments: int
    """Elements of the optimizer's moments."""
    largest_layer: int
    left_gathered: int
    """Of modules that ZeRO-3 gathers for the backward pass and does not let go before its end."""
    saved_in_layers: int
    """What decoder and vision layers keep for the backward pass."""
    saved_elsewhere: int
    largest_saved: int
    """Of one layer: what recomputing it needs."""
    layer_inputs: int
    """What recomputing starts from."""
    prefix_tokens: int
    """What an image is to the language model."""
    kept_of_token: int
    """Bytes of a token's keys and values in all layers, while answers are decoded."""
    forward_flops: int
    backward_flops: int
    recomputed_flops: int

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return sum(self.sizes) * self.element_bytes

    @property
    def adapter_bytes(self) -> int:
        """Of a checkpoint's weights, which are float32: the adapter, or the whole model where there is none."""
        return 4 * (self.trained + self.stacked)

    @property
    def checkpoint_bytes(self) -> int:
        """Of a whole checkpoint: its weights are the masters, beside them lie the moments."""
        return self.adapter_bytes + 4 * self.moments


@dataclass(frozen=True)
class Plan:
    """Per GPU, for a number of GPUs. Bytes; FLOPs of one global step over all GPUs, recomputation included."""

    gpus: int
    memory: dict[str, float] = field(default_factory=dict)
    offloaded: dict[str, float] = field(default_factory=dict)
    """What this rank keeps elsewhere: in the machine's memory or on its disk, as `train.deepspeed` says."""
    step_flops: float = 0.0
    useful_flops: float = 0.0
    """Without what is recomputed: what MFU counts."""

    @property
    def total(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory.values())


def trace(config: RunConfig, model_config: CogVLMConfig, questions: int, tokens: int) -> Trace:
    """Trace a micro-batch of `config`, `questions` an image, each of `tokens` with its answer, on the meta device."""
    from cogvlm_hpe.train.adapter import add_lora, stack_shapes, stacked_factors

    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    with torch.device("meta"), _default_dtype(dtype):
        model = CogVLMForCausalLM(model_config).train()
        if config.adapter is not None:
            add_lora(model, config.adapter, config.model.base)
            if config.adapter.stack:
                stack_shapes(model, config.adapter.stack)
    model.to(dtype)
    saved, flops, calls = _Saved(model), _Flops(model), _Calls(model)
    with _flash(), _linear(config.train.zero_stage), flops.counter:
        with saved.hooks():
            loss = model(**_batch(config.train.micro_batch, questions, tokens, model_config, dtype)).loss
        flops.mark_forward()
        loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = [layer for layer in model.modules() if isinstance(layer, DecoderLayer | VisionLayer)]
    return Trace(
        element_bytes=dtype.itemsize,
        sizes=tuple(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained.values()),
        stacked=sum(p.numel() for p in stacked_factors(model).values()),
        moments=sum(p.numel() * _n_moments(config.train, name, p) for name, p in trained.items()),
        largest_layer=max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers),
        left_gathered=dtype.itemsize * sum(map(_own_elements, calls.left_gathered())),
        saved_in_layers=saved.bytes.total() - saved.bytes[None],
        saved_elsewhere=saved.bytes[None],
        largest_saved=max((n for name, n in saved.bytes.items() if name is not None), default=0),
        layer_inputs=saved.layer_inputs,
        prefix_tokens=model_config.image_tokens + 3,
        kept_of_token=2 * model_config.num_hidden_layers * model_config.hidden_size * dtype.itemsize,
        forward_flops=flops.forward,
        backward_flops=flops.counter.get_total_flops() - flops.forward,
        recomputed_flops=flops.in_layers,
    )


def plan(config: RunConfig, traced: Trace, gpus: int) -> Plan:
    """Memory and FLOPs on so many GPUs. The global batch stays; ranks get their share of it."""
    train, recompute = config.train, config.train.gradient_checkpointing
    kept = traced.layer_inputs + traced.largest_saved if recompute else traced.saved_in_layers
    memory = _state(train, traced, gpus)
    offloaded = {part: memory.pop(part) for part in _offloaded_parts(train)}
    if "gradients" in offloaded:  # the optimizer's own float32 ones, and below stage 3 those of micro-batches before
        adds_up = train.zero_stage < 3 and config.shards.batch > gpus * train.micro_batch
        offloaded["gradients"] += (4 + adds_up * traced.element_bytes) * traced.trained / gpus
    activations = float(kept + traced.saved_elsewhere)
    judging = max(0.0, _judging(config, traced) - activations)
    memory |= {"activations": activations, "judging beyond those": judging, "reserved": _RESERVED}
    micro_batches = ceil(config.shards.batch / train.micro_batch)
    useful = micro_batches * (traced.forward_flops + traced.backward_flops)
    extra = micro_batches * traced.recomputed_flops if recompute else 0
    return Plan(gpus, memory, offloaded, float(useful + extra), float(useful))


def _judging(config: RunConfig, traced: Trace) -> float:
    """Bytes that answering holds: of each image's prefix the keys and values twice, once with room for the answers."""
    judged = config.evaluate
    if not config.train.evaluate_every:
        return 0.0
    questions = judged.questions * (_QUESTION_TOKENS + judged.max_new_tokens)
    return float(traced.kept_of_token * (2 * judged.batch * traced.prefix_tokens + questions))


def _state(train: TrainConfig, traced: Trace, gpus: int) -> dict[str, float]:
    """Bytes that a rank holds from step to step, and what DeepSpeed adds for moving them, by part."""
    stage, zero, each = train.zero_stage, train.deepspeed.get("zero_optimization", {}), traced.element_bytes
    of_sum = 4 if stage >= 2 else each  # float32 sums of gradients; at stage 1 DeepSpeed takes another optimizer for it
    optimizer = 4 * (traced.moments + (traced.trained if stage else 0))  # stage 0 trains the float32 weights themselves
    buckets = (2 if zero.get("overlap_comm") and stage < 3 else 1) if zero.get("contiguous_gradients", True) else 0
    split = stage == 3 and gpus > 1
    bucket = (4 if stage == 3 else each) * int(zero.get("reduce_bucket_size", SPLIT_BUCKET if stage == 3 else 5e8))
    return {
        "weights": float(each * sum(ceil(size / gpus) for size in traced.sizes)) if split else float(traced.weights),
        **(_gathered(train, traced) if split else {"kept whole": 0.0, "gathered layers": 0.0}),
        "gradients": of_sum * traced.trained / (gpus if stage >= 2 else 1),
        "gradient buckets": float(buckets * bucket) if stage else 0.0,
        "optimizer": optimizer / (gpus if stage >= 1 else 1),
    }


def _gathered(train: TrainConfig, traced: Trace) -> dict[str, float]:
    """ZeRO-3: small parameters, which every rank keeps whole, and the most that it gathers besides.

    What comes again within stage3_max_reuse_distance stays: around the turn from forward to backward that is half of it
    either way. A module that is called twice, for the image prefix and for the questions, DeepSpeed 0.19.8 lets go
    after one of its two backward passes only; where layers are recomputed each call counts by itself, but what was
    gathered for recomputing a layer stays until the next one's turn.
    """
    zero, each = train.deepspeed.get("zero_optimization", {}), traced.element_bytes
    persistent = int(zero.get("stage3_param_persistence_threshold", 1e5))
    small = float(each * sum(size for size in traced.sizes if size <= persistent))
    reused = int(zero.get("stage3_max_reuse_distance", 1e9)) / 2 + int(zero.get("stage3_prefetch_bucket_size", 5e7))
    recompute, layer = train.gradient_checkpointing, traced.largest_layer
    most = max(each * reused, 2 * layer) if recompute else max(each * reused + traced.left_gathered, layer)
    return {"kept whole": small, "gathered layers": float(min(most, traced.weights - small))}


def _offloaded_parts(train: TrainConfig) -> list[str]:
    zero, parts = train.deepspeed.get("zero_optimization", {}), list[str]()
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        parts.append("weights")
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        parts += ["gradients", "optimizer"]
    return parts


def _n_moments(train: TrainConfig, name: str, parameter: Tensor) -> int:
    return 1 if train.optimizer == "muon" and is_matrix(name, parameter) else 2


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


class _Calls:
    """How often modules with parameters were called, where gradients flow: to inputs, and from outputs."""

    def __init__(self, model: CogVLMForCausalLM) -> None:
        self.from_output: Counter[nn.Module] = Counter()
        self.to_input: Counter[nn.Module] = Counter()
        for module in model.modules():
            if _own_elements(module):
                module.register_forward_hook(self._leave)

    def _leave(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self.from_output[module] += any(t.requires_grad for t in tree_leaves(output) if isinstance(t, Tensor))
        self.to_input[module] += any(t.requires_grad for t in tree_leaves(given) if isinstance(t, Tensor))

    def left_gathered(self) -> list[nn.Module]:
        """DeepSpeed 0.19.8 lets a module go when its last call's input has its gradient, and counts that call alone."""
        return [module for module, calls in self.from_output.items() if calls and self.to_input[module] != 1]


def _own_elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


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


class _Zero3Linear(torch.autograd.Function):
    """As DeepSpeed has a linear layer under ZeRO-3: it keeps its input also where the weight does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (…, n_in), weight (n_out, n_in)."""
        ctx.save_for_backward(x, weight, bias)
        out = x.flatten(0, -2) @ weight.t()
        return (out if bias is None else out + bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, where they are wanted."""
        x, weight, bias = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        of_x = (grad @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        of_weight = grad.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, grad.sum(0) if bias is not None and ctx.needs_input_grad[2] else None


@contextmanager
def _linear(stage: int) -> Iterator[None]:
    plain = F.linear
    if stage == 3:
        F.linear = _Zero3Linear.apply
    try:
        yield
    finally:
        F.linear = plain


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
