"""Decoder layers with two experts, and the routing of tokens to them.

boi and image tokens go to the vision expert; bos, eoi and text to the language expert. Both norms are shared.

Shapes: B rows, L tokens, D width, A heads, E head width, P prefix tokens, K key positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from cogvlm_hpe.model.configuration import CogVLMConfig

Transform = Callable[[Tensor], Tensor]


class TextRouting:
    """Every token is text."""

    def __call__(self, x_BLD: Tensor, language: Transform, vision: Transform) -> Tensor:
        """Language expert on all of x."""
        return language(x_BLD)


class PrefixRouting:
    """bos, [boi, image], eoi: the vision expert takes a plain slice, so nothing is scattered."""

    def __call__(self, x_BLD: Tensor, language: Transform, vision: Transform) -> Tensor:
        """Language expert on the first and last token, vision expert on those between."""
        ends = language(torch.cat([x_BLD[:, :1], x_BLD[:, -1:]], dim=1))
        return torch.cat([ends[:, :1], vision(x_BLD[:, 1:-1]), ends[:, 1:]], dim=1)


@dataclass
class IndexRouting:
    """Any order of text and images: row-major indices of each expert's tokens, and what undoes their joining."""

    language: Tensor
    vision: Tensor
    back: Tensor

    def __call__(self, x_BLD: Tensor, language: Transform, vision: Transform) -> Tensor:
        """Each expert on its tokens; both are called even when one has none, as ZeRO-3 needs."""
        flat = x_BLD.flatten(0, 1)
        joined = torch.cat([language(flat[self.language]), vision(flat[self.vision])])
        return joined[self.back].view(*x_BLD.shape[:2], -1)


def unadapted(module: nn.Module) -> nn.Module:
    """The base layer under a peft adapter, or the module itself where there is none."""
    return getattr(module, "base_layer", module)


def rope_table(
    positions: Tensor, head_width: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (…, E), of positions (…): "rotate half" rotary embedding (RoFormer, Llama's layout).

    In bfloat16 it is the table CogVLM was trained with: frequencies, positions and their products each rounded, so
    that angles are off by 0.02 rad at position 16 and positions above 256 collide.
    """
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    frequencies = (1.0 / theta**exponents).to(dtype)
    angles = positions[..., None].to(dtype) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BALE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a rotary table of shape (L, E) or (B, 1, L, E)."""
    cos, sin = rope
    left, right = x_BALE.chunk(2, dim=-1)
    return (x_BALE * cos + torch.cat([-right, left], dim=-1) * sin).to(x_BALE.dtype)


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class ExpertAttention(nn.Module):
    """Attention whose projections are doubled: one pair for vision, one for language."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.vision_expert_query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.vision_expert_dense = nn.Linear(width, width, bias=False)
        self.language_expert_query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)

    def project(self, x_BLD: Tensor, routing: Callable, adapted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, A, L, E)."""
        of = _same if adapted else unadapted
        qkv = routing(x_BLD, of(self.language_expert_query_key_value), self.vision_expert_query_key_value)
        qkv = qkv.view(*x_BLD.shape[:2], 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        # A view would keep all of qkv alive for as long as the values are: three times their size.
        return qkv[0], qkv[1], qkv[2].contiguous()

    def merge(self, heads_BALE: Tensor, routing: Callable, adapted: bool) -> Tensor:
        """(B, A, L, E) to (B, L, D)."""
        of = _same if adapted else unadapted
        x_BLD = heads_BALE.transpose(1, 2).flatten(2)
        return routing(x_BLD, of(self.language_expert_dense), self.vision_expert_dense)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, adapted: bool = True) -> Tensor:
        """(…, D) to (…, D)."""
        of = _same if adapted else unadapted
        return of(self.down_proj)(F.silu(of(self.gate_proj)(x)) * of(self.up_proj)(x))


class ExpertMLP(nn.Module):
    """One MLP for vision, one for language."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.language_mlp = MLP(config)
        self.vision_mlp = MLP(config)

    def forward(self, x_BLD: Tensor, routing: Callable, adapted: bool) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return routing(x_BLD, lambda x: self.language_mlp(x, adapted), self.vision_mlp)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm Llama layer with experts. `adapted` false leaves every adapter out (scope `text` on the prefix)."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.self_attn = ExpertAttention(config)
        self.mlp = ExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BLD: Tensor,
        rope: tuple[Tensor, Tensor],
        routing: Callable,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        adapted: bool = True,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output (B, L, D) and its keys and values (B, A, L, E).

        `attend(q, k, v)` says who sees whom. `keys_only` stops after the keys: what follows the last layer of a
        prefix is read by nobody.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x_BLD), routing, adapted)
        k = rotate(k, rope)
        if keys_only:
            return x_BLD, k, v
        x_BLD = x_BLD + self.self_attn.merge(attend(rotate(q, rope), k, v), routing, adapted)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD), routing, adapted), k, v


def _same(module: nn.Module) -> nn.Module:
    return module
