"""EVA2-CLIP vision tower and the GLU adapter that brings its patches into the decoder's space.

Shapes: B images, S image side in px, N patches = (S / patch)², C vision width, D decoder width, A heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from cogvlm_hpe.model.configuration import CogVLMConfig


class PatchEmbedding(nn.Module):
    """Patches with a class token in front; learned positions for all."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        width, patch = vision["hidden_size"], vision["patch_size"]
        self.proj = nn.Conv2d(vision["in_channels"], width, kernel_size=patch, stride=patch)
        self.cls_embedding = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Embedding(vision["num_positions"], width)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, 1 + N, C)."""
        patches_BNC = self.proj(pixels_B3SS).flatten(2).transpose(1, 2)
        cls = self.cls_embedding.expand(len(patches_BNC), 1, -1)
        return torch.cat([cls, patches_BNC], dim=1) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Full attention with fused [q; k; v]."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        width = vision["hidden_size"]
        self.n_heads = vision["num_heads"]
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        batch, length, width = x_BLC.shape
        qkv = self.query_key_value(x_BLC).view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.dense(out.transpose(1, 2).reshape(batch, length, width))


class VisionMLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision["hidden_size"], vision["intermediate_size"])
        self.fc2 = nn.Linear(vision["intermediate_size"], vision["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(GradientCheckpointingLayer):
    """A block whose norms stand after its branches: x + LN(attention(x)), then x + LN(mlp(x))."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        width, eps = vision["hidden_size"], vision["layer_norm_eps"]
        self.input_layernorm = nn.LayerNorm(width, eps=eps)
        self.attention = VisionAttention(vision)
        self.mlp = VisionMLP(vision)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        x = x + self.input_layernorm(self.attention(x))
        return x + self.post_attention_layernorm(self.mlp(x))


class VisionTransformer(nn.Module):
    """The stack of vision layers."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision["num_hidden_layers"]))


class GLUAdapter(nn.Module):
    """Vision width to decoder width: linear, LayerNorm, GELU, SwiGLU. No residual, one token a patch."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(config.vision_config["hidden_size"], width, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(width, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        x = F.gelu(self.norm1(self.linear_proj(x_BNC)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class VisionTower(nn.Module):
    """Pixels to the decoder's image tokens: [boi; patches; eoi]."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = VisionTransformer(vision)
        self.linear_proj = GLUAdapter(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) to image tokens (B, N + 2, D) and the tower's own patches (B, N, C)."""
        x_BLC = self.patch_embedding(pixels_B3SS.to(self.boi.dtype))
        for layer in self.transformer.layers:
            x_BLC = layer(x_BLC)
        patches_BNC = x_BLC[:, 1:]
        tokens_BND = self.linear_proj(patches_BNC)
        ends = (len(tokens_BND), 1, -1)
        return torch.cat([self.boi.expand(*ends), tokens_BND, self.eoi.expand(*ends)], dim=1), patches_BNC
