"""CogVLM: one image prefix, any number of text branches that share it; and the plain call.

Image tokens come first and never see text (causal attention), so everything up to eoi is the same for every question
on an image: it is computed once, and each branch attends to its keys and values. Exact for loss, gradients, decoding.

Shapes: I images, S image side in px, N image tokens, P = N + 3 prefix tokens (bos, boi, image, eoi), R branches,
B rows, L tokens, Q slots of a row of packed branches, D width, A heads, E head width, V vocabulary, T labelled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from cogvlm_hpe.model.attention import AfterPrefix, Attend, Where, causal, packed_kernel
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.decoding import greedy
from cogvlm_hpe.model.experts import DecoderLayer, IndexRouting, PrefixRouting, RMSNorm, TextRouting, rope_table
from cogvlm_hpe.model.layout import (
    IGNORE,
    LabelLayout,
    find_labels,
    lay_out_rows,
    pack_branches,
    prefix_positions,
)
from cogvlm_hpe.model.vision import VisionTower


@dataclass
class CogVLMOutput(ModelOutput):
    """What a call gives back; `patches` are the vision tower's (I, N, C), `image_tokens` the adapter's (I, N, D)."""

    loss: Tensor | None = None
    branch_losses: Tensor | None = None  # (R,) detached mean over an answer's tokens; 0 without an answer
    logits: Tensor | None = None
    patches: Tensor | None = None
    image_tokens: Tensor | None = None
    watched: Tensor | None = None  # (R, heads, L, P) scores of the watched heads on the prefix, before the softmax
    past_key_values: Cache | None = None


@dataclass
class Prefix:
    """Keys and values of the image prefixes, a pair (I, A, P, E) a layer."""

    layers: list[tuple[Tensor, Tensor]]
    patches: Tensor
    image_tokens: Tensor

    @property
    def tokens(self) -> int:
        """P."""
        return self.layers[0][0].shape[2]


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
        self.post_init()

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary table of positions: (L,) to (L, E), (B, L) to (B, 1, L, E)."""
        width = self.config.hidden_size // self.config.num_attention_heads
        dtype = getattr(torch, self.config.rope_dtype)
        cos, sin = rope_table(positions, width, self.config.rope_theta, dtype)
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])

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
                x, keys, values = layer(x, rope, PrefixRouting(), causal, adapted, last)
                pairs.append((keys, values))
        return Prefix(pairs, patches, image_tokens[:, 1:-1])

    def run_branches(
        self, ids_IQ: Tensor, position_IQ: Tensor, kernel: Attend, prefix: Prefix, watch: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Packed branches to hidden states (I, Q, D), and the scores (I, heads, Q, P) of the watched heads.

        `kernel` says who sees whom in [prefix; row]; `watch` is (layer, heads): the first heads of that layer.
        """
        x, watched = self.embed_tokens(ids_IQ), None
        rope = self.rope(position_IQ)
        for number, (layer, past) in enumerate(zip(self.layers, prefix.layers, strict=True)):
            attend = AfterPrefix(past, kernel, watch[1] if watch and watch[0] == number else 0)
            x, _, _ = layer(x, rope, TextRouting(), attend)
            watched = attend.scores if attend.scores is not None else watched
        return self.norm(x), watched

    def run_rows(
        self,
        input_ids: Tensor,
        types: Tensor,
        mask: Tensor,
        pixel_values: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Plain rows (B, L) to hidden states (B, L, D); `types` and `mask` (B, K) also cover what `cache` holds."""
        layout = lay_out_rows(types, mask, input_ids.shape[1])
        n_images = 0 if pixel_values is None else len(pixel_values)
        if len(layout.image_slots) != n_images * (self.config.image_tokens + 2):
            raise ValueError(
                f"{len(layout.image_slots)} image slots in token_type_ids do not fit {n_images} images of "
                f"{self.config.image_tokens + 2} tokens (boi and eoi included)"
            )
        layout = layout.to(input_ids.device)
        x = self.embed_tokens(input_ids)
        if pixel_values is not None:
            image_tokens, _ = self.vision(pixel_values)
            rows = x.flatten(0, 1).index_copy(0, layout.image_slots, image_tokens.flatten(0, 1).to(x.dtype))
            x = rows.view_as(x)
        routing = IndexRouting(layout.language, layout.vision, layout.back)
        rope = self.rope(layout.position)
        first = input_ids.shape[1] == types.shape[1]
        kernel = causal if first and layout.seen is None else Where(layout.seen)
        for number, layer in enumerate(self.layers):
            x, _, _ = layer(x, rope, routing, kernel if cache is None else _AfterCache(cache, number, kernel))
        return self.norm(x)


class _AfterCache:
    """Attention of new tokens to those of a transformers cache and themselves."""

    def __init__(self, cache: Cache, layer: int, kernel: Attend) -> None:
        self.cache, self.layer, self.kernel = cache, layer, kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.update(k, v, self.layer)
        return self.kernel(q, keys, values)


class CogVLMForCausalLM(CogVLMPreTrainedModel, GenerationMixin):
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
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        image_index: Tensor | None = None,
        branch_input_ids: Tensor | None = None,
        branch_attention_mask: Tensor | None = None,
        branch_labels: Tensor | None = None,
        all_logits: bool = False,
        watch: tuple[int, int] | None = None,
        return_dict: bool = True,
    ) -> CogVLMOutput:
        """One conversation a row (`input_ids`, `token_type_ids`, …), or branches that share their images' prefixes.

        Branches: `pixel_values` (I, 3, S, S), `image_index` (R,), `branch_input_ids`, `branch_attention_mask` and
        `branch_labels` (R, L): the text after eoi, right-padded, at least one token of it without a label; labels
        unshifted, -100 for no loss. Give the four on the CPU, whatever the model is on: their layout is worked out
        there, and a step then never waits for the device. `loss` is the mean over answers of the mean cross-entropy
        of an answer's tokens; `logits` stand at labelled positions only, (T, V), or at all (R, L, V) with
        `all_logits`. `watch` (layer, heads) also returns how those heads score the prefix.

        With `past_key_values`, `input_ids` are the new tokens, `token_type_ids` and `attention_mask` cover all.
        Raises ValueError for shapes that do not fit, before any compute.
        """
        self._check_pixels(pixel_values)
        if branch_input_ids is None:
            return self._plain(
                input_ids, token_type_ids, attention_mask, pixel_values, labels, past_key_values, use_cache,
                logits_to_keep,
            )  # fmt: skip
        return self._branches(
            pixel_values, image_index, branch_input_ids, branch_attention_mask, branch_labels, all_logits, watch
        )

    def _branches(
        self,
        pixel_values: Tensor | None,
        image_index: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        all_logits: bool,
        watch: tuple[int, int] | None,
    ) -> CogVLMOutput:
        if pixel_values is None or image_index is None:
            raise ValueError("branches need pixel_values and image_index")
        for name, given in (("branch_attention_mask", mask), ("branch_labels", labels)):
            if given is not None and given.shape != ids.shape:
                raise ValueError(f"{name} {tuple(given.shape)}: must be as branch_input_ids {tuple(ids.shape)}")
        if image_index.shape != ids.shape[:1]:
            raise ValueError(f"image_index {tuple(image_index.shape)}: one image for each of {len(ids)}")
        mask = torch.ones_like(ids) if mask is None else mask
        host = pack_branches(image_index, mask, len(pixel_values))
        found = None if labels is None else find_labels(labels, mask, host).to(self.device)
        layout = host.to(self.device)
        packed = ids.to(self.device, non_blocking=True).flatten()[layout.token_of_slot]
        prefix = self.model.encode_prefix(pixel_values, adapted=self.adapter_scope == "all")
        kernel = packed_kernel(layout.branch_of_slot, prefix.tokens, self.dtype)
        hidden, scores = self.model.run_branches(packed, layout.position, kernel, prefix, watch)
        output = CogVLMOutput(patches=prefix.patches, image_tokens=prefix.image_tokens)
        if scores is not None:
            output.watched = scores.transpose(1, 2).flatten(0, 1)[layout.slot_of_token].transpose(1, 2)
        if found is None or all_logits:
            output.logits = self.lm_head(hidden.flatten(0, 1)[layout.slot_of_token])
        if found is not None:
            logits, output.loss, output.branch_losses = self._answer_loss(hidden, found, len(ids))
            output.logits = logits if output.logits is None else output.logits
        return output

    def _answer_loss(self, hidden_IQD: Tensor, found: LabelLayout, branches: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.lm_head(hidden_IQD.flatten(0, 1)[found.slot])
        losses = F.cross_entropy(logits.float(), found.target, reduction="none")
        of_branch = torch.zeros(branches, device=losses.device).index_add(0, found.branch, losses * found.weight)
        # A batch without answers still has a graph: ranks must agree on what they call.
        loss = of_branch.sum() / max(1, found.n_answers) + 0.0 * hidden_IQD[:1, :1].sum()
        return logits, loss, of_branch.detach()

    def _check_pixels(self, pixel_values: Tensor | None) -> None:
        side = self.config.vision_config["image_size"]
        if pixel_values is None:
            return
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)}: this model takes (images, 3, {side}, {side})")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values {pixel_values.dtype}: must be floats, normalised by the processor")

    def _plain(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        labels: Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int,
    ) -> CogVLMOutput:
        if input_ids is None:
            raise ValueError("a call needs input_ids, or branch_input_ids")
        if self.adapter_scope == "text":
            raise ValueError("adapter scope 'text' needs the branch call: a plain row would adapt its image tokens too")
        past = 0 if cache is None else cache.get_seq_length()
        shape = (len(input_ids), past + input_ids.shape[1])
        types = torch.zeros(shape, dtype=torch.long) if token_type_ids is None else token_type_ids
        mask = torch.ones(shape, dtype=torch.long) if attention_mask is None else attention_mask
        for name, given in (("token_type_ids", types), ("attention_mask", mask)):
            if given.shape != shape:
                raise ValueError(f"{name} {tuple(given.shape)}: must be {shape}, cached tokens included")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)}: must be as input_ids {tuple(input_ids.shape)}")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden = self.model.run_rows(input_ids, types, mask, pixel_values, cache)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CogVLMOutput(loss=loss, logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: object,
    ) -> dict[str, object]:
        """What `generate` calls `forward` with: images once, then new tokens beside whole types and masks."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, past:],
            "token_type_ids": token_type_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values if past == 0 else None,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }

    @torch.no_grad()
    def answer(
        self,
        pixel_values: Tensor,
        image_index: Sequence[int],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
    ) -> list[list[int]]:
        """Greedy answers to prompts (token ids after eoi), without eos; all questions on an image share its prefix.

        `pixel_values` (I, 3, S, S); `image_index[r]` is the image of prompt r. An answer ends at eos or after
        `max_new_tokens`, one limit for all or one each. Raises ValueError for what does not fit, before any compute.
        """
        self._check_pixels(pixel_values)
        if len(image_index) != len(prompts) or not all(0 <= number < len(pixel_values) for number in image_index):
            raise ValueError(f"image_index {list(image_index)}: name one of {len(pixel_values)} images for each prompt")
        if not all(prompts):
            raise ValueError("prompts: each needs a token")
        prefix = self.model.encode_prefix(pixel_values, adapted=self.adapter_scope == "all")
        return greedy(self, prefix, image_index, prompts, max_new_tokens)


for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(CogVLMConfig, CogVLMForCausalLM, exist_ok=True)
