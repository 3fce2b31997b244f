"""What a merge did, for people: a table, a heatmap and a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvlm_hpe.merge.layerwise import Choice

_RULE = {
    "layerwise": "Per layer, the tuned weight stays where its cosine similarity to the original reaches the threshold; "
    "elsewhere the original weight is back (winner takes all, as in HPE-CogVLM, arXiv 2406.01914). "
    "The paper's public text gives no threshold: this one is our choice.",
    "task-arithmetic": "Every layer's change is multiplied by its adapter's weight and added to the base.",
}


def markdown(merge: dict[str, Any], choices: Sequence[Choice]) -> str:
    """merge.md: what was done, then one line per adapted layer."""
    lines = ["# Merge", "", _RULE[merge["method"]], ""]
    lines += [f"- {key}: {value}" for key, value in merge.items() if not isinstance(value, list | dict)]
    if choices:
        lines += ["", "| layer | similarity | winner |", "|---|---|---|"]
        lines += [f"| {c.layer} | {c.similarity:.6f} | {winner(c)} |" for c in choices]
    return "\n".join(lines) + "\n"


def winner(choice: Choice) -> str:
    """`tuned` or `base`."""
    return "tuned" if choice.tuned else "base"


def card(name: str, base: Path, merge: dict[str, Any]) -> str:
    """README.md of the merged adapter: what it is, what it was made of, how to load it."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="peft", base_model=base.name, tags=["head-pose-estimation", "lora", "merge"])
    kept = f"{merge['tuned']} of {merge['layers_total']} adapted layers stay tuned. " if "tuned" in merge else ""
    parts = "\n".join(f"- `{a['name']}`, weight {a['weight']:g}, sha256 `{a['sha256']}`" for a in merge["adapters"])
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nHead pose adapter of `{base.name}`, merged by `{merge['method']}`. "
        f"{kept}{_RULE[merge['method']]}\n\n## Made of\n\n{parts}\n\n## Use\n\n"
        f"    cogvlm-hpe predict IMAGE --box X0,Y0,X1,Y1 --model {name}\n\n"
        "Layer by layer: `merge.md` and `merge.json`. Plain `peft.PeftModel.from_pretrained` loads the factors too, "
        "but knows nothing of the adapter scope in `hpe.json`: with scope `text` use this project's loader.\n"
    )


def heatmap(path: Path, choices: Sequence[Choice], threshold: float) -> None:
    """PNG of similarities: numbered layers down, projections across, a cross where the base won."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    towers: dict[str, dict[tuple[int, str], Choice]] = {}
    for choice in choices:
        tower, number, projection = _place(choice.layer)
        towers.setdefault(tower, {})[number, projection] = choice
    tallest = max(len({row for row, _ in cells}) for cells in towers.values())
    widest = sum(len({column for _, column in cells}) for cells in towers.values())
    size = (3.0 + 1.2 * widest + 1.5 * len(towers), 3.0 + 0.28 * tallest)
    figure, axes = plt.subplots(1, len(towers), figsize=size, squeeze=False, layout="constrained")
    low = min(choice.similarity for choice in choices)
    for axis, (tower, cells) in zip(axes[0], sorted(towers.items()), strict=True):
        image = _panel(axis, tower, cells, low)
    figure.colorbar(image, ax=axes[0].tolist(), label="cosine similarity of tuned and original weight")
    figure.suptitle(f"Layers that stay tuned: similarity ≥ {threshold:.6g}; × = original weight is back")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _place(layer: str) -> tuple[str, int, str]:
    """(tower, number, projection): `a.layers.3.b.c` is (`a.layers`, 3, `b.c`)."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return "other", 0, layer
    at = numbers[0]
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def _panel(axis: Any, tower: str, cells: dict[tuple[int, str], Choice], low: float) -> Any:
    import numpy as np

    rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), choice in cells.items():
        at = rows.index(row), columns.index(column)
        grid[at] = choice.similarity
        if not choice.tuned:
            axis.plot(at[1], at[0], "x", color="white", markersize=6)
    image = axis.imshow(grid, vmin=low, vmax=1.0, cmap="viridis", aspect="auto")
    axis.set_title(tower, fontsize=9)
    axis.set_yticks(range(len(rows)), [str(row) for row in rows])
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7)
    axis.set_ylabel("layer")
    return image
