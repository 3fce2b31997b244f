"""Scores in the card of the model they are about: README.md of its folder, for people and for the hub's model index."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogvlm_hpe.evaluate.reduce import headline
from cogvlm_hpe.evaluate.rendering import markdown_table, replace_file
from cogvlm_hpe.evaluate.results import CONSTANT, Result, score_table
from launcher.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
_HEADING = "## Evaluation"
_SECTION = re.compile(rf"^{_HEADING}[ \t]*$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_TASK = "head-pose-estimation"
_TEXT = (
    "Whole images, one head asked about at a time. Errors in degrees, 95 % intervals from resampling images in "
    f"brackets; the {CONSTANT} is the floor without any skill. Grounding: objects found with IoU ≥ 0.5. An answer that "
    "is no pose is charged the constant pose, and none is left out."
)


def write_card(folder: Path, results: Sequence[Result]) -> None:
    """Put the scores of those `results` that are about the model in `folder` into its README.md.

    A card that is there keeps everything but the scores of an earlier evaluation; else one is begun. Raises UserError
    where no result is about it, or where its card cannot be read or written.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from yaml import YAMLError

    own = [result for result in results if _model(result) == folder.resolve()]
    if not own:
        raise UserError(f"--card {folder}: none of the results is about it; name the folder that was judged")
    path, name = folder / CARD, folder.resolve().name
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else f"# {name}\n"
        if not text.startswith("---"):
            text = f"---\n{ModelCardData(tags=[_TASK]).to_yaml()}\n---\n\n{text}"
        card = ModelCard(text)
        card.data.model_name = card.data.model_name or name
        card.data.eval_results = [r for r in card.data.eval_results or [] if r.task_type != _TASK] + _index(own)
        replace_file(path, f"---\n{card.data.to_yaml()}\n---\n\n{_with_scores(card.text, own)}")
    except (OSError, ValueError, YAMLError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{path}: the scores cannot be put in ({said}); mend it, or move it away") from None


def _model(result: Result) -> Path | None:
    judged = result.run.get("adapter") or result.run.get("model")
    return Path(judged).resolve() if judged else None


def _index(results: Sequence[Result]) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=str(result.metrics["set"].get("source") or result.set_name),
            dataset_name=result.set_name,
            dataset_split=result.metrics["set"].get("split"),
            metric_type=name,
            metric_value=value,
        )
        for result in results
        for name, value in headline(result.tasks).items()
    ]


def _with_scores(text: str, results: Sequence[Result]) -> str:
    """The card's text with a section of scores, in the place of the one it had, or at its end."""
    made = "\n".join(_made(result) for result in results)
    section = "\n\n".join([_HEADING, _TEXT, markdown_table(*score_table(results)), made])
    old = _SECTION.search(text)
    before, after = (text[: old.start()], text[old.end() :]) if old else (text, "")
    return "\n\n".join(part.strip() for part in (before, section, after) if part.strip()) + "\n"


def _made(result: Result) -> str:
    said, decoding = result.metrics["set"], result.metrics.get("decoding", {})
    how = ", ".join(f"{key} {decoding[key]}" for key in ("decode", "dtype", "batch") if key in decoding)
    when = result.run.get("start_time", "")[:10]
    return f"- `{result.set_name}`: {said.get('images')} images, split {said.get('split')}; {how}; {when}"
