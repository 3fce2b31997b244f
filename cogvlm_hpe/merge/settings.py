"""What a merge is asked to do: from flags, from a YAML file, or from code; and which of it cannot be meant."""

import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from launcher.errors import UsageError, UserError

EXACT = ("layerwise", "linear", "task-arithmetic", "cat", "slerp")
DARE = ("dare-linear", "dare-ties")
ELEMENTWISE = ("ties", *DARE, "magnitude-prune", "breadcrumbs")
METHODS = EXACT + ELEMENTWISE
OUTPUTS = ("adapter", "hf", "sat")
GRANULARITIES = ("projection", "module", "block")
KEEPS = ("above", "below")
_CHOICES = {"method": METHODS, "keep": KEEPS, "output": OUTPUTS, "granularity": GRANULARITIES}
_LAYERWISE_ONLY = ("threshold", "quantile", "sweep", "sweep_thresholds", "keep", "granularity")


@dataclass(frozen=True)
class Settings:
    """Keys of a merge's YAML file; the flags are the same with `-`."""

    base: str = ""
    adapter: list[Path] = field(default_factory=list)
    out: Path = Path()
    method: str = "layerwise"
    threshold: float | None = None
    quantile: float | None = None
    sweep: list[float] = field(default_factory=list)
    sweep_thresholds: list[float] = field(default_factory=list)
    keep: str = "above"
    granularity: str = "projection"
    weight: list[float] = field(default_factory=list)
    layer_weight: list[str] = field(default_factory=list)
    t: float = 0.5
    density: float | None = None
    gamma: float = 0.01
    seed: int = 0
    rank: int | None = None
    output: str = "adapter"
    mp: int = 1
    max_shard_gb: float = 5.0
    every_token: bool = False

    @property
    def weights(self) -> list[float]:
        """One for each adapter."""
        return self.weight or [1.0] * len(self.adapter)

    @property
    def sweeps(self) -> bool:
        """Whether several candidates are written."""
        return bool(self.sweep or self.sweep_thresholds)


DEFAULTS = Settings()


def from_mapping(values: dict[str, Any], where: str) -> Settings:
    """Settings from keys and values. Raises UsageError for an unknown key or a value of another type."""
    hints = get_type_hints(Settings)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise UsageError(f"{where}: {unknown[0]}: no such key; known are {', '.join(sorted(hints))}")
    return Settings(**{key: _cast(f"{where}: {key}", hints[key], value) for key, value in values.items()})


def _cast(where: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [_cast(where, get_args(hint)[0], item) for item in items]
    if get_origin(hint) is types.UnionType:
        return None if value is None else _cast(where, get_args(hint)[0], value)
    right = {float: (int, float), Path: (str, Path)}.get(hint, (hint,))
    if not isinstance(value, right) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where}: {value!r} is no {hint.__name__}; give one")
    return hint(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of keys. Raises UserError where it is none."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: no readable YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys; see cogvlm-hpe merge --help for their names")
    return values


def check(settings: Settings) -> None:
    """Raises UsageError for settings that cannot be meant together."""
    for name in ("base", "adapter", "out"):
        if getattr(settings, name) == getattr(DEFAULTS, name):
            raise UsageError(f"--{name} is needed")
    if settings.out.exists():
        raise UsageError(f"--out {settings.out}: exists already; choose another folder or remove it")
    for name, known in _CHOICES.items():
        if getattr(settings, name) not in known:
            raise UsageError(f"--{name} {getattr(settings, name)}: must be one of {', '.join(known)}")
    _check_method(settings)
    _check_numbers(settings)
    _check_output(settings)


def _check_method(settings: Settings) -> None:
    method, count = settings.method, len(settings.adapter)
    most = {"layerwise": 2, "slerp": 2}.get(method)
    if most and count > most:
        raise UsageError(f"--method {method} takes one --adapter or two, got {count}; sum some of them first")
    if method != "layerwise":
        _refuse(settings, _LAYERWISE_ONLY, "--method layerwise")
    if method in ("layerwise", "cat", "slerp"):
        _refuse(settings, ("weight", "layer_weight"), "the other methods; this one takes layers as they are")
    if method != "slerp":
        _refuse(settings, ("t",), "--method slerp")
    if method != "breadcrumbs":
        _refuse(settings, ("gamma",), "--method breadcrumbs")
    if method not in DARE:
        _refuse(settings, ("seed",), f"--method {' or '.join(DARE)}")
    if method not in ELEMENTWISE:
        _refuse(settings, ("density", "rank"), f"one of {', '.join(ELEMENTWISE)}")
    elif settings.density is None:
        raise UsageError(f"--method {method} needs --density, the share of elements that stays, e.g. 0.2")
    if settings.weight and len(settings.weight) != count:
        raise UsageError(f"{len(settings.weight)} --weight for {count} --adapter: give one each, in the same order")


def _check_numbers(settings: Settings) -> None:
    limits = (settings.threshold is not None, settings.quantile is not None, settings.sweep, settings.sweep_thresholds)
    if sum(map(bool, limits)) > 1:
        raise UsageError("--threshold, --quantile, --sweep and --sweep-thresholds exclude each other; give one")
    for name, values in (("sweep", settings.sweep), ("sweep-thresholds", settings.sweep_thresholds)):
        if len(set(values)) < len(values):
            raise UsageError(f"--{name}: names a candidate twice; leave one out")
    if not all(map(math.isfinite, settings.weight)):
        raise UsageError("--weight: must be a finite number")
    shares = [("quantile", settings.quantile), ("t", settings.t), ("gamma", settings.gamma)]
    for name, share in shares + [("sweep", value) for value in settings.sweep]:
        if share is not None and not 0.0 <= share <= 1.0:
            raise UsageError(f"--{name} {share}: must be within [0, 1]")
    if settings.density is not None and not 0.0 < settings.density <= 1.0:
        raise UsageError(f"--density {settings.density}: must be above 0 and at most 1")
    for name in ("rank", "mp", "max_shard_gb"):
        value = getattr(settings, name)
        if value is not None and not value > 0:  # NaN is not, either
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be above 0")


def _check_output(settings: Settings) -> None:
    if settings.output == "adapter":
        _refuse(settings, ("every_token",), "--output hf or sat")
    elif settings.rank is not None or settings.sweeps:
        raise UsageError(f"--rank and sweeps give adapters, not --output {settings.output}; leave one out")
    if settings.output != "hf":
        _refuse(settings, ("max_shard_gb",), "--output hf; SAT's files are as many as --mp says")
    if settings.output != "sat":
        _refuse(settings, ("mp",), "--output sat; Hugging Face files are split by size, with --max-shard-gb")


def _refuse(settings: Settings, names: tuple[str, ...], home: str) -> None:
    for name in names:
        if getattr(settings, name) != getattr(DEFAULTS, name):
            raise UsageError(f"--{name.replace('_', '-')} belongs to {home}")
