"""What a merge did, for people: tables, a heatmap and a model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_hpe.merge.layerwise import DIGITS, Choice

_PAPER = "as in HPE-CogVLM, arXiv 2406.01914, whose public text gives no threshold: this one is our choice"
_RULE = {
    "layerwise": "Per layer one side wins whole. One adapter: its tuned weight stays where its cosine similarity to "
    "the original is on the kept side of the threshold, elsewhere the original is back. Two adapters: where the cosine "
    f"similarity of their changes is on the kept side, the second one's layer wins, elsewhere the first's ({_PAPER}).",
    "linear": "The average of the tuned models, by weight.",
    "task-arithmetic": "Every layer's change is multiplied by its adapter's weight and added to the base.",
    "cat": "The exact sum of all changes, factors side by side.",
    "slerp": "Spherical interpolation between the changes of two adapters, layer by layer.",
    "ties": "TIES (arXiv 2306.01708): of each layer's change the largest elements; per element the weighted majority's "
    "sign; the weighted mean of those that agree.",
    "dare-linear": "DARE (arXiv 2311.03099): elements dropped by chance, the rest grown by as much; then the sum.",
    "dare-ties": "DARE (arXiv 2311.03099): elements dropped by chance, the rest grown by as much; then the sum of "
    "those with the weighted majority's sign.",
    "magnitude-prune": "Of each layer's change the largest elements; then the weighted sum.",
    "breadcrumbs": "Model breadcrumbs (arXiv 2312.06795): each layer's change without its largest and its smallest "
    "elements; then the weighted sum.",
}


@dataclass(frozen=True)
class Losses:
    """Layer → share of its merged change that is lost, and by what."""

    by: str
    of: dict[str, float]


def layer_rows(choices: Sequence[Choice], losses: Losses) -> list[dict[str, Any]]:
    """What is known of each layer, in name order."""
    key = f"lost_by_{losses.by.replace(' ', '_')}"
    rows: dict[str, dict[str, Any]] = {}
    for c in choices:
        rows[c.layer] = {
            "layer": c.layer, "group": c.group, "similarity": c.similarity, "winner": winner(c), "rank": c.rank
        }  # fmt: skip
    for layer, loss in losses.of.items():
        rows.setdefault(layer, {"layer": layer})[key] = loss
    return [rows[layer] for layer in sorted(rows)]


def markdown(merge: dict[str, Any], layers: Sequence[dict[str, Any]]) -> str:
    """merge.md: what was done, then one line per layer of which something is known."""
    lines = ["# Merge", "", _RULE[merge["method"]], ""]
    lines += [f"- {key}: {value}" for key, value in merge.items() if not isinstance(value, list | dict)]
    lines += [f"- {key}: {value}" for key, value in merge.get("text_only_lost", {}).items()]
    keys = [key for key in dict.fromkeys(key for row in layers for key in row) if key != "group"]
    if keys:
        lines += ["", f"| {' | '.join(key.replace('_', ' ') for key in keys)} |", "|---" * len(keys) + "|"]
        lines += [f"| {' | '.join(_cell(row.get(key, '')) for key in keys)} |" for row in layers]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:{DIGITS}}" if isinstance(value, float) else str(value)


def sweep(rows: Sequence[dict[str, Any]]) -> str:
    """sweep.md: one line per candidate."""
    lines = ["# Sweep", "", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(value) for value in row.values())} |" for row in rows)]) + "\n"


def winner(choice: Choice) -> str:
    """`tuned` or `base`; of two adapters the second or the first."""
    return "tuned" if choice.tuned else "base"


def card(name: str, base: Path, merge: dict[str, Any]) -> str:
    """README.md of what was merged: what it is, what it was made of and by which versions, how to load it."""
    from huggingface_hub import ModelCardData

    dense = "output" in merge
    data = ModelCardData(
        library_name="transformers" if dense else "peft",
        base_model=base.name,
        tags=["head-pose-estimation", "merge"] + ([] if dense else ["lora"]),
    )
    kept = f"{merge['tuned']} of {merge['layers_total']} compared layers are tuned. " if "tuned" in merge else ""
    parts = "\n".join(f"- `{a['name']}`, weight {a['weight']:g}, sha256 `{a['sha256']}`" for a in merge["adapters"])
    versions = ", ".join(f"{package} {version}" for package, version in merge["versions"].items())
    what = "Weights of" if dense else "Head pose adapter of"
    loading = "" if dense else _LOADING
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{what} `{base.name}`, merged by `{merge['method']}`. "
        f"{kept}{_RULE[merge['method']]}\n\n## Made of\n\n{parts}\n- base `{base.name}`, fingerprint "
        f"`{merge['base_fingerprint']}`\n- by {versions}\n\n## Use\n\n"
        f"    cogvlm-hpe predict IMAGE --box X0,Y0,X1,Y1 --model {name}\n\nAll settings: `merge.md`, `merge.json`."
        f"{loading}\n"
    )


_LOADING = (
    " Plain `peft.PeftModel.from_pretrained` loads the factors too, "
    "but knows nothing of the adapter scope in `hpe.json`: with scope `text` use this project's loader."
)


def tensorboard(folder: Path, text: str) -> None:
    """The heat map and the table for TensorBoard, without times: the same bytes from run to run."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard.summary import text as text_summary

    picture = Summary.Image(encoded_image_string=(folder / "heatmap.png").read_bytes())
    summaries = [Summary(value=[Summary.Value(tag="merge/heatmap", image=picture)]), text_summary("merge/layers", text)]
    (folder / "tensorboard").mkdir(exist_ok=True)  # a merge that was killed right here goes on in the same folder
    with (folder / "tensorboard" / "events.out.tfevents.merge").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())
        for summary in summaries:
            writer.write(Event(summary=summary).SerializeToString())


def heatmap(path: Path, choices: Sequence[Choice], merge: dict[str, Any]) -> None:
    """PNG of similarities: numbered layers down, projections across, a cross where the base (or first) won."""
    from matplotlib.figure import Figure

    towers: dict[str, dict[tuple[int, str], Choice]] = {}
    for choice in choices:
        tower, number, projection = _place(choice.layer)
        towers.setdefault(tower, {})[number, projection] = choice
    tallest = max(len({row for row, _ in cells}) for cells in towers.values())
    widest = sum(len({column for _, column in cells}) for cells in towers.values())
    size = (3.0 + 1.2 * widest + 1.5 * len(towers), 3.0 + 0.28 * tallest)
    figure = Figure(figsize=size, layout="constrained")  # not pyplot's: that one belongs to whoever imports us
    axes = figure.subplots(1, len(towers), squeeze=False)
    two = len(merge["adapters"]) == 2
    low = min(choice.similarity for choice in choices)
    high = max(choice.similarity for choice in choices) if two else 1.0
    for axis, (tower, cells) in zip(axes[0], sorted(towers.items()), strict=True):
        image = _panel(axis, tower, cells, (low, high))
    figure.colorbar(image, ax=axes[0].tolist(), label=_HEAT[two][0])
    sign = "≥" if merge["keep"] == "above" else "≤"
    figure.suptitle(f"{_HEAT[two][1]}: similarity {sign} {merge['threshold']:{DIGITS}}; × = {_HEAT[two][2]}")
    figure.savefig(path, dpi=110, metadata={"Software": None})


_HEAT = {
    False: ("cosine similarity of tuned and original weight", "Layers that stay tuned", "original weight is back"),
    True: ("cosine similarity of both changes", "Layers of the second adapter", "the first adapter's layer"),
}


def _place(layer: str) -> tuple[str, int, str]:
    """(tower, number, projection): `a.layers.3.b.c` is (`a.layers`, 3, `b.c`)."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return "other", 0, layer
    at = numbers[0]
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def _panel(axis: Any, tower: str, cells: dict[tuple[int, str], Choice], limits: tuple[float, float]) -> Any:
    import numpy as np

    rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), choice in cells.items():
        at = rows.index(row), columns.index(column)
        grid[at] = choice.similarity
        if not choice.tuned:
            axis.plot(at[1], at[0], "x", color="white", markersize=6)
    image = axis.imshow(grid, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto")
    axis.set_title(tower, fontsize=9)
    axis.set_yticks(range(len(rows)), [str(row) for row in rows])
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7)
    axis.set_ylabel("layer")
    return image
