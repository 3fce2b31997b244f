"""What the engine trains: the model and, for a base, its dense read-outs, behind one forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogvlm_hpe.config import AuxiliaryConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.pixels import normalise
from cogvlm_hpe.train.auxiliary import DenseHeads, dense_targets, guidance_loss
from cogvlm_hpe.train.batch import Batch
from launcher.errors import UsageError

MODEL_PREFIX = "cogvlm."


class TrainedModule(nn.Module):
    """Engines hook `forward`, so everything that needs gradients goes through it."""

    def __init__(self, cogvlm: CogVLMForCausalLM, auxiliary: AuxiliaryConfig | None) -> None:
        """Raises UsageError where a decoder layer is to be guided that the model does not have."""
        super().__init__()
        self.cogvlm = cogvlm
        self.auxiliary = auxiliary
        config = cogvlm.config
        guided, layers = (auxiliary.guided_layer if auxiliary else 0), config.num_hidden_layers
        if not (auxiliary and auxiliary.tower_only) and guided not in range(layers):
            raise UsageError(f"train.auxiliary.guided_layer {guided}: the model's decoder layers are 0 to {layers - 1}")
        sees = auxiliary is not None and auxiliary.dense > 0
        self.dense = DenseHeads(config.vision_config["hidden_size"], config.hidden_size) if sees else None

    def forward(self, batch: Batch | Callable[[], Any]) -> Any:
        """The losses of a batch; or, for `Engine.inside`, what a function gives that uses the model."""
        return self._losses(batch) if isinstance(batch, Batch) else batch()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sum of the answers' losses (0-d), each branch's loss (R,), and the auxiliary loss summed over images."""
        if self.auxiliary is not None and self.auxiliary.tower_only:
            return self._tower(batch)
        # Indices stay on the host: the model lays them out there and moves them itself, without a wait.
        out = self.cogvlm(
            pixel_values=self._pixels(batch),
            image_index=batch.image_index,
            branch_input_ids=batch.input_ids,
            branch_attention_mask=batch.attention_mask,
            branch_labels=batch.labels,
            watch=(self.auxiliary.guided_layer, self.auxiliary.guided_heads) if self.auxiliary else None,
        )
        total = out.loss * max(1, batch.n_answers)
        if self.auxiliary is None:
            return total, out.branch_losses, None
        side = int(out.patches.shape[1] ** 0.5)
        extra = self.auxiliary.guidance * guidance_loss(out.watched, batch.labels, batch.boxes, side)
        if self.dense is not None:
            targets = dense_targets(batch.records, side)
            extra = extra + self.auxiliary.dense * self.dense(out.patches, out.image_tokens, targets)
        return total, out.branch_losses, extra * len(batch.records)

    def _pixels(self, batch: Batch) -> Tensor:
        """(I, 3, S, S) in the tower's range; a quarter of the bytes travels, without a wait for page-locked images."""
        return normalise(batch.images.to(self.cogvlm.device, non_blocking=True), self.cogvlm.dtype)

    def _tower(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The dense loss alone: nothing is asked, and no gradient reaches the decoder."""
        assert self.auxiliary is not None and self.dense is not None, "tower_only without dense: refused by the config"
        tokens, patches = self.cogvlm.model.vision(self._pixels(batch))
        targets = dense_targets(batch.records, int(patches.shape[1] ** 0.5))
        extra = self.auxiliary.dense * self.dense(patches, tokens[:, 1:-1], targets)
        nothing = torch.zeros(0, device=patches.device)
        return nothing.sum(), nothing, extra * len(batch.records)
