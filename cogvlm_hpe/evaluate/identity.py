"""What a result is a result of: the set, the weights and the settings, by what is in them and not by where they lie.

A folder may be made again at the same place and another be moved; only what is in them tells whether an evaluation
that was begun, or a result that is there, is that of the job at hand.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvlm_hpe.evaluate.reduce import RUN
from cogvlm_hpe.model.folders import NOTES_FILE, base_of, is_adapter, read_json, resolve_base
from launcher.errors import UsageError, UserError
from launcher.files import sha256

_TENSORS = "adapter_model.safetensors"
_JOB = "job"


def inputs_of(model: str | Path, adapter: Path | None) -> dict[str, str]:
    """Fingerprint of the base, sha256 of adapter and hpe.json as far as they are there; of a crop network its files'.

    Raises UserError where there is no model.
    """
    from cogvlm_hpe.evaluate.baselines import cnn
    from cogvlm_hpe.model.fingerprint import fingerprint

    path = Path(model)
    if path.is_file():
        return {path.name: sha256(path)}
    if cnn.is_cnn(path):
        files = [path / name for name in (cnn.CONFIG_FILE, cnn.WEIGHTS_FILE)]
        return {file.name: sha256(file) for file in files if file.is_file()}
    if adapter is None and is_adapter(path):
        adapter, path = path, base_of(path)
    base = resolve_base(path)
    found = {"base": fingerprint(base)}
    if adapter and (adapter / _TENSORS).is_file():
        found[_TENSORS] = sha256(adapter / _TENSORS)
    notes = (adapter or base) / NOTES_FILE
    return found | ({NOTES_FILE: _sha256_of_notes(notes)} if notes.is_file() else {})


def _sha256_of_notes(path: Path) -> str:
    """Of all but the scores, which training adds to a checkpoint later."""
    notes = {key: value for key, value in read_json(path).items() if key != "scores"}
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def kept_job(job: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of a result, with `job` in it, which `check_finished` compares."""
    return {**run, _JOB: dict(job)}


def check_finished(out: Path, job: Mapping[str, Any]) -> None:
    """Raise UsageError unless the finished result in `out` is that of `job`. Raises UserError where it is damaged."""
    try:
        before = json.loads((out / RUN).read_text(encoding="utf-8"))[_JOB]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{out}: not a whole result ({error!r}); remove it, and --resume judges anew") from None
    changed = changes(before, job)
    if changed:
        said = f"is finished, but {', '.join(changed)} changed since it was made"
        raise UsageError(f"--resume: {out} {said}; set it back, or remove {out}, or name another --out")


def changes(before: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    """Keys of `job` whose values are not those of `before`, which was read from JSON and may lack some."""
    return [key for key in job if key in before and before[key] != json.loads(json.dumps(job[key]))]
