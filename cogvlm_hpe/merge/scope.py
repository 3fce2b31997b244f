"""What is lost when an adapter that works on text tokens only becomes weights, which change image tokens too."""

import tempfile
from pathlib import Path
from typing import Any

from cogvlm_hpe.merge.factors import Adapter, Factors, write_adapter

_BOXES = ("100,200,300,500", "250,100,450,400", "500,300,700,650", "600,100,900,500")


def difference(base: Path, like: Adapter, factors: Factors) -> dict[str, Any]:
    """How far the logits move, on pose questions about one image of fixed noise; keys say what.

    Needs the model in memory, in the base's own dtype. Raises UserError where it cannot be loaded.
    """
    import torch

    from cogvlm_hpe.dialogue import ask
    from cogvlm_hpe.model.load import load
    from cogvlm_hpe.model.weights import open_weights

    dtype = open_weights(base).dtype("lm_head.weight")
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), factors, like, base.resolve())
        loaded = load(base, folder, dtype=dtype)
    model = loaded.model
    side_px = model.config.vision_config["image_size"]
    pixels = torch.randn(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(0)).to(dtype)
    queries = [ask("pose", loaded.notes["prompts"], box=f"[[{box}]]") for box in _BOXES]
    ids = torch.tensor([loaded.tokenizer.encode(query, add_special_tokens=False).ids for query in queries])
    images, logits = torch.zeros(len(ids), dtype=torch.long), {}
    with torch.no_grad():
        for scope in ("text", "all"):
            model.adapter_scope = scope
            found = model(pixel_values=pixels, image_index=images, branch_input_ids=ids)
            logits[scope] = found.logits[:, -1].float()
    moved = (logits["all"] - logits["text"]).abs()
    changed = int((logits["all"].argmax(-1) != logits["text"].argmax(-1)).sum())
    return {
        "mean_logit_difference": float(f"{float(moved.mean()):.4g}"),
        "largest_logit_difference": float(f"{float(moved.max()):.4g}"),
        "spread_of_logits": float(f"{float(logits['text'].std()):.4g}"),
        "first_tokens_changed": f"{changed} of {len(ids)}",
    }
