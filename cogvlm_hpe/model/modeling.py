"""CogVLM: one image prefix, any number of text branches that share it; and the plain call.

Image tokens come first and never see text (causal attention), so everything up to eoi is the same for every question
on an image: it is computed once, and each branch attends to its keys and values. Exact for loss, gradients, decoding.

Shapes: I images, S image side in px, N image tokens, P = N + 3 prefix tokens (bos, boi, image, eoi), R branches,
B rows, L tokens, D width, A heads, E head width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.experts import (
    DecoderLayer,
    IndexRouting,
    PrefixRouting,
    RMSNorm,
    TextRouting,
    rope_table,
)
from cogvlm_hpe.model.vision import VisionTower

IGNORE = -100  # a label that carries no loss
FIRST_TEXT_POSITION = 4  # bos 0, boi 1, all image tokens 2, eoi 3


@dataclass
class CogVLMOutput(ModelOutput):
    """What a call gives back; `patches` are the vision tower's (I, N, C), `image_tokens` the adapter's (I, N, D)."""

    loss: Tensor | None = None
    branch_losses: Tensor | None = None  # (R,) detached mean over an answer's tokens; 0 without an answer
    logits: Tensor | None = None
    patches: Tensor | None = None
    image_tokens: Tensor | None = None
    watched: Tensor | None = None  # (R, heads, L, P) scores of the watched heads on the prefix, before the softmax


@dataclass
class Prefix:
    """Keys and values of the image prefixes, a pair (I, A, P, E) a layer."""

    layers: list[tuple[Tensor, Tensor]]
    patches: Tensor
    image_tokens: Tensor

    def of_branches(self, layer: int, image_index: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix of each branch's image, (R, A, P, E) twice."""
        keys, values = self.layers[layer]
        return keys.index_select(0, image_index), values.index_select(0, image_index)


class CogVLMPreTrainedModel(PreTrainedModel):
    """Initialisation and loading."""

    config_class = CogVLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionLayer"]
    # Published files carry the rotary frequencies, rounded to bf16; they are computed here instead.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for name in ("boi", "eoi", "cls_embedding"):
            parameter = module._parameters.get(name)
            if parameter is not None:
                nn.init.normal_(parameter, std=std)


class CogVLMModel(CogVLMPreTrainedModel):
    """Embeddings, vision tower, decoder layers and final norm."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = VisionTower(config)
        self.gradient_checkpointing = False
        self.post_init()

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary table of positions (…)."""
        return rope_table(positions, self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta)

    def run_layer(self, layer: DecoderLayer, *args: object) -> tuple[Tensor, Tensor, Tensor]:
        """A decoder layer, recomputed in the backward pass when gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def encode_prefix(self, pixel_values: Tensor, adapted: bool) -> Prefix:
        """Images (I, 3, S, S) to their prefix. `adapted` false: base weights and no gradient (scope `text`)."""
        with torch.set_grad_enabled(adapted and torch.is_grad_enabled()):
            image_tokens, patches = self.vision(pixel_values)
            bos = torch.full((len(image_tokens), 1), self.config.bos_token_id, device=image_tokens.device)
            x = torch.cat([self.embed_tokens(bos), image_tokens], dim=1)
            rope = self.rope(prefix_positions(self.config.image_tokens, x.device))
            pairs = []
            for layer in self.layers:
                last = layer is self.layers[-1]
                x, keys, values = self.run_layer(layer, x, rope, PrefixRouting(), attend_causal, adapted, last)
                pairs.append((keys, values))
        return Prefix(pairs, patches, image_tokens[:, 1:-1])

    def run_branches(
        self, branch_ids: Tensor, prefix: Prefix, image_index: Tensor, watch: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Right-padded branches (R, L) to their hidden states (R, L, D), and the scores of the watched heads.

        `watch` is (layer, heads): the first heads of that layer.
        """
        length = branch_ids.shape[1]
        rope = self.rope(FIRST_TEXT_POSITION + torch.arange(length, device=branch_ids.device))
        seen = branch_mask(prefix.layers[0][0].shape[2], length, branch_ids.device)
        x, watched = self.embed_tokens(branch_ids), None
        for number, layer in enumerate(self.layers):
            past = prefix.of_branches(number, image_index)
            attend = _AttendAfter(past, seen, watch[1] if watch and watch[0] == number else 0)
            x, _, _ = self.run_layer(layer, x, rope, TextRouting(), attend)
            watched = attend.scores if attend.scores is not None else watched
        return self.norm(x), watched


class CogVLMForCausalLM(CogVLMPreTrainedModel):
    """CogVLM with its language head.

    `adapter_scope` says where a LoRA adapter acts: `all` tokens, or `text` only, so that the image prefix keeps the
    base weights, needs no gradient and is the same for every adapter.
    """

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.adapter_scope = "all"
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        branch_input_ids: Tensor | None = None,
        branch_attention_mask: Tensor | None = None,
        branch_labels: Tensor | None = None,
        all_logits: bool = False,
        watch: tuple[int, int] | None = None,
    ) -> CogVLMOutput:
        """One conversation a row (`input_ids`, `token_type_ids`, …), or branches that share their images' prefixes.

        Branches: `pixel_values` (I, 3, S, S), `image_index` (R,), `branch_input_ids` and `branch_labels` (R, L): the
        text after eoi, right-padded, at least one token of it without a label; labels unshifted, -100 for no loss.
        `loss` is the mean over answers of the mean cross-entropy of an answer's tokens; `logits` stand at labelled
        positions only, (labels, V), or at all (R, L, V) with `all_logits`. Padding needs no mask: it comes last and
        attention is causal. `watch` (layer, heads) also returns how those heads score the prefix.

        Raises ValueError for shapes that do not fit, before any compute.
        """
        if branch_input_ids is None:
            return self._plain(input_ids, token_type_ids, attention_mask, pixel_values, labels)
        if pixel_values is None or image_index is None:
            raise ValueError("branches need pixel_values and image_index")
        if image_index.shape != branch_input_ids.shape[:1]:
            raise ValueError(f"image_index {tuple(image_index.shape)}: one image for each of {len(branch_input_ids)}")
        prefix = self.model.encode_prefix(pixel_values, adapted=self.adapter_scope == "all")
        hidden, watched = self.model.run_branches(branch_input_ids, prefix, image_index, watch)
        output = CogVLMOutput(patches=prefix.patches, image_tokens=prefix.image_tokens, watched=watched)
        if branch_labels is None or all_logits:
            output.logits = self.lm_head(hidden)
        if branch_labels is not None:
            logits, output.loss, output.branch_losses = self._answer_loss(hidden, branch_labels)
            output.logits = logits if output.logits is None else output.logits
        return output

    def _answer_loss(self, hidden_RLD: Tensor, labels_RL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        targets = labels_RL[:, 1:]
        rows, columns = (targets != IGNORE).nonzero(as_tuple=True)
        logits = self.lm_head(hidden_RLD[rows, columns])
        losses = F.cross_entropy(logits.float(), targets[rows, columns], reduction="none")
        tokens = torch.bincount(rows, minlength=len(targets)).clamp(min=1)
        answers = (targets != IGNORE).any(dim=1).sum().clamp(min=1)
        branches = torch.zeros(len(targets), device=losses.device).index_add(0, rows, losses / tokens[rows])
        # A batch without answers still has a graph: ranks must agree on what they call.
        return logits, branches.sum() / answers + 0.0 * hidden_RLD[:1, :1].sum(), branches.detach()

    def _plain(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        labels: Tensor | None,
    ) -> CogVLMOutput:
        if input_ids is None:
            raise ValueError("a call needs input_ids, or branch_input_ids")
        if self.adapter_scope == "text":
            raise ValueError("adapter scope 'text' needs the branch call: a plain row would adapt its image tokens too")
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            image_tokens, _ = self.model.vision(pixel_values)
            slots = (types == 1) & (mask == 1)
            if int(slots.sum()) != image_tokens.shape[0] * image_tokens.shape[1]:
                raise ValueError(
                    f"{int(slots.sum())} image slots in token_type_ids do not fit {len(image_tokens)} images of "
                    f"{image_tokens.shape[1]} tokens (boi and eoi included)"
                )
            x = x.masked_scatter(slots[..., None], image_tokens.to(x.dtype))
        vision = vision_tokens(types)
        routing = IndexRouting((~vision).flatten().nonzero()[:, 0], vision.flatten().nonzero()[:, 0])
        rope = tuple(table[:, None] for table in self.model.rope(plain_positions(types, mask)))
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        # A padding row must see something, itself, or its softmax is empty.
        seen = (causal & (mask == 1)[:, None, :]) | torch.eye(length, dtype=torch.bool, device=x.device)
        for layer in self.model.layers:
            x, _, _ = self.model.run_layer(layer, x, rope, routing, _attend_where(seen[:, None]))
        hidden = self.model.norm(x)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CogVLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def answer(
        self, pixel_values: Tensor, image_index: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers to prompts (token ids after eoi), without eos; all questions on an image share its prefix.

        `pixel_values` (I, 3, S, S); `image_index[r]` is the image of prompt r. An answer ends at eos or after
        `max_new_tokens`.
        """
        device = pixel_values.device
        index = torch.as_tensor(image_index, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids = torch.full((len(prompts), int(lengths.max())), self.config.pad_token_id or 0, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.as_tensor(prompt, device=device)
        prefix = self.model.encode_prefix(pixel_values, adapted=self.adapter_scope == "all")
        return _GreedyDecoder(self, prefix, index, lengths, max_new_tokens).run(ids)


class _GreedyDecoder:
    """Keys and values of prefix, prompt and answer in one buffer a layer; each row writes at its own length."""

    def __init__(
        self, model: CogVLMForCausalLM, prefix: Prefix, image_index: Tensor, lengths: Tensor, new_tokens: int
    ) -> None:
        self.model, self.lengths, self.new_tokens = model, lengths, new_tokens
        self.n_prefix = prefix.layers[0][0].shape[2]
        room = int(lengths.max()) + new_tokens
        self.buffers = []
        for number in range(len(prefix.layers)):
            pair = prefix.of_branches(number, image_index)
            self.buffers.append([F.pad(t, (0, 0, 0, room)) for t in pair])
        self.key_position = torch.arange(self.n_prefix + room, device=lengths.device) - self.n_prefix

    def run(self, prompt_ids: Tensor) -> list[list[int]]:
        """(R, L) right-padded prompts to lists of answer tokens."""
        positions = torch.arange(prompt_ids.shape[1], device=prompt_ids.device).expand_as(prompt_ids)
        hidden = self._step(prompt_ids, positions)
        rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        last = hidden[rows, self.lengths - 1]
        eos = self.model.config.eos_token_id
        answers: list[Tensor] = []
        done = torch.zeros_like(rows, dtype=torch.bool)
        for number in range(self.new_tokens):
            token = self.model.lm_head(last).argmax(dim=-1).masked_fill(done, eos)
            answers.append(token)
            done = done | (token == eos)
            if number + 1 == self.new_tokens or bool(done.all()):
                break
            last = self._step(token[:, None], (self.lengths + number)[:, None])[:, 0]
        table = torch.stack(answers, dim=1).tolist()
        return [row[: row.index(eos)] if eos in row else row for row in table]

    def _step(self, ids_RL: Tensor, positions_RL: Tensor) -> Tensor:
        decoder = self.model.model
        rope = tuple(table[:, None] for table in decoder.rope(FIRST_TEXT_POSITION + positions_RL))
        seen = (self.key_position <= positions_RL[..., None])[:, None]
        rows = torch.arange(len(ids_RL), device=ids_RL.device)[:, None]
        slots = self.n_prefix + positions_RL
        x = decoder.embed_tokens(ids_RL)
        for layer, buffer in zip(decoder.layers, self.buffers, strict=True):
            x, _, _ = layer(x, rope, TextRouting(), _attend_buffer(buffer, rows, slots, seen))
        return decoder.norm(x)


def prefix_positions(image_tokens: int, device: torch.device) -> Tensor:
    """bos 0, boi 1, every image token 2, eoi 3: (P,)."""
    return torch.tensor([0, 1, *[2] * image_tokens, 3], device=device)


def vision_tokens(types_BL: Tensor) -> Tensor:
    """Which tokens the vision expert takes: type 1 followed by type 1, so boi and image but not eoi. (B, L) bool."""
    vision = torch.zeros_like(types_BL, dtype=torch.bool)
    vision[:, :-1] = (types_BL[:, :-1] == 1) & (types_BL[:, 1:] == 1)
    return vision


def plain_positions(types_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Positions of a plain row: one step a token, but the image tokens of one image share one. (B, L)."""
    vision = vision_tokens(types_BL)
    inner = torch.zeros_like(vision)
    # boi is the first vision token of its run and steps; so does the first image token; those after it do not.
    inner[:, 2:] = vision[:, 2:] & vision[:, 1:-1] & vision[:, :-2]
    steps = (mask_BL == 1) & ~inner
    return (steps.long().cumsum(dim=1) - 1).clamp(min=0)


def branch_mask(prefix: int, length: int, device: torch.device) -> Tensor:
    """Who a branch's tokens see: all of the prefix, and the branch so far. (L, P + L) bool."""
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.cat([torch.ones(length, prefix, dtype=torch.bool, device=device), own], dim=1)


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, A, L, E)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attend_where(seen: Tensor):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class _AttendAfter:
    """Attention of a branch to its prefix and itself; keeps the scores of the first `watched` heads on the prefix."""

    def __init__(self, past: tuple[Tensor, Tensor], seen: Tensor, watched: int) -> None:
        self.past, self.seen, self.watched = past, seen, watched
        self.scores: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.watched:
            n = self.watched
            self.scores = q[:, :n] @ self.past[0][:, :n].transpose(-1, -2) * q.shape[-1] ** -0.5
        keys, values = torch.cat([self.past[0], k], dim=2), torch.cat([self.past[1], v], dim=2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.seen)


def _attend_buffer(buffer: list[Tensor], rows: Tensor, slots: Tensor, seen: Tensor):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        buffer[0][rows, :, slots] = k.transpose(1, 2)
        buffer[1][rows, :, slots] = v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, buffer[0], buffer[1], attn_mask=seen)

    return attend
