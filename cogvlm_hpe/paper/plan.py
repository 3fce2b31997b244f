"""The stages of the paper's comparison: what is made once, what each seed makes, and the sweeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvlm_hpe import stages
from cogvlm_hpe.paper.choose import Candidate, choose
from cogvlm_hpe.stages import Stage

SETS = {
    "a-train": ("A", "train"),
    "a-val": ("A", "val"),
    "a-test": ("A", "test"),
    "b-test": ("B", "test"),
    "c-test": ("C", "test"),
    "w-train": ("W", "train"),
    "a-base": ("A", "base"),
    "b-base": ("B", "base"),
}
TESTS = ("a-test", "b-test", "c-test")
TASKS = "pose,where,what"
CROPS = {"cnn": ("a-train",), "cnn-more-heads": ("a-train", "a-base", "b-base")}
"""Networks on head crops, and what they are trained on: the second on all heads that the base was taught, too."""
REHEARSAL = {"lora": 0.0, "lora-10": 0.10, "lora-25": 0.25}
"""Share of questions about objects in the weak and in the supervised stage."""
CONTINUED_REHEARSAL = 0.5
CONTINUED = ("layerwise", "lora", "task-arithmetic")
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75)
WEIGHTS = (0.3, 0.5, 0.7, 0.85)
DENSITIES = (0.2, 0.5, 0.8)
PROBE = "probe.json"
FULL_RANK = 128
"""Of the tiny base's layers: TIES and DARE leave no low rank, and at the full one nothing of them is lost."""


@dataclass(frozen=True)
class Sizes:
    """Scenes of each set and steps of each training; kept beside the results, which are only valid for them."""

    train_scenes: int = 2400
    weak_scenes: int = 1200
    a_base_scenes: int = 15000
    b_base_scenes: int = 9000
    val_scenes: int = 100
    test_scenes: int = 200
    cnn_steps: int = 1500
    weak_steps: int = 300
    max_steps: int = 900
    continued_steps: int = 200
    data_seed: int = 1

    def scenes(self, name: str) -> int:
        """Scenes of the set called `name`."""
        by_split = {"train": self.train_scenes, "val": self.val_scenes, "test": self.test_scenes}
        by_name = {"w-train": self.weak_scenes, "a-base": self.a_base_scenes, "b-base": self.b_base_scenes}
        return by_name[name] if name in by_name else by_split[SETS[name][1]]


QUICK = Sizes(train_scenes=24, weak_scenes=8, a_base_scenes=8, b_base_scenes=8, val_scenes=6, test_scenes=6,
              cnn_steps=4, weak_steps=2, max_steps=2, continued_steps=2)  # fmt: skip
"""Shows that everything runs, teaches nothing."""


@dataclass(frozen=True)
class Place:
    """Where things are: the whole comparison, and one seed's part of it, in `folder` or one named by the seed."""

    root: Path
    sizes: Sizes
    nproc: int
    seed: int = 1
    folder: str = ""

    @property
    def own(self) -> Path:
        """Of this seed."""
        return self.root / (self.folder or f"seed-{self.seed}")

    @property
    def base(self) -> Path:
        """The copy of the packaged base."""
        return self.root / "base"

    def set(self, name: str) -> Path:
        """A shard set of all seeds."""
        return self.root / "shards" / name

    def adapter(self, system: str) -> Path:
        """Of a system of this seed."""
        return self.own / "chosen" / system if system in _CHOSEN else self.own / system / "last"


ABOUT = Path(__file__).parent
"""Where the files are that say what each system is."""
_CHOSEN = ("task-arithmetic", "ties", "dare", "layerwise")


def plan(root: Path, sizes: Sizes, seeds: Sequence[int], nproc: int) -> list[Stage]:
    """All stages of all seeds in order."""
    places = [Place(root, sizes, nproc, seed) for seed in seeds]
    first = places[0]
    return [
        *(stages.shards(first.set(name), *SETS[name], sizes.scenes(name), sizes.data_seed, nproc) for name in SETS),
        stages.base(first.base),
        _probe(first),
        *(stage for at in places for stage in _seed(at)),
        *(stage for at in places for on in TESTS for stage in _judged(at, on, with_base=at is first)),
        report(root, [root / "evaluation" / on for on in TESTS], "systems.yaml"),
    ]


def _probe(at: Place) -> Stage:
    def work() -> None:
        from cogvlm_hpe.paper.probe import probe

        probe(at.base, at.set("a-train"), [at.set(on) for on in TESTS], at.root / PROBE)

    return Stage("probe the base", at.root / PROBE, work)


def _seed(at: Place) -> list[Stage]:
    """Everything one seed trains and merges."""
    weak = at.own / "w-weak"
    labels = stages.program("cogvlm_hpe", "label", at.set("w-train"), "--with", f"cnn:{at.own / 'cnn'}")
    return [
        *(_crops(at, name, sets) for name, sets in CROPS.items()),
        _named(at, "weak labels", weak / "index.json", [*labels, "--relabel", "--out", str(weak)]),
        *(stage for system, share in REHEARSAL.items() for stage in _tuned(at, system, share)),
        *_merges(at),
        *(_continued(at, system) for system in CONTINUED),
    ]


def _crops(at: Place, name: str, sets: Sequence[str]) -> Stage:
    command = stages.program("cogvlm_hpe", "train-cnn", "--shards", *map(at.set, sets), "--out", at.own / name)
    return _named(at, name, at.own / name, [*command, "--steps", str(at.sizes.cnn_steps), "--seed", str(at.seed)])


def _named(at: Place, name: str, result: Path, work: list[str]) -> Stage:
    return Stage(f"{at.own.name}: {name}", result, work)


def _tuned(at: Place, system: str, share: float) -> list[Stage]:
    """The weak and the supervised stage, `share` of the questions being about objects."""
    weak = at.own / f"{system}-weak"
    return [
        trained(at, f"{system}-weak", at.own / "w-weak", share, at.sizes.weak_steps),
        trained(at, system, at.set("a-train"), share, at.sizes.max_steps, "--adapter.init", weak / "last"),
    ]


def _continued(at: Place, system: str) -> Stage:
    start = ("--adapter.init", at.adapter(system), "--train.lr", 1e-3, "--train.warmup_steps", 20)
    return trained(at, f"{system}-continued", at.set("a-train"), CONTINUED_REHEARSAL, at.sizes.continued_steps, *start)


def trained(at: Place, system: str, posed: Path, share: float, steps: int, *more: object) -> Stage:
    """Pose questions from `posed`, and `share` of the images asked about objects, always from A's training set."""
    mix: list[dict[str, Any]] = [{"path": str(posed), "ratio": 1.0 - share, "ask": ["pose"]}]
    if share:
        mix.append({"path": str(at.set("a-train")), "ratio": share, "ask": ["where", "what"]})
    seeds = ("--train.seed", at.seed, "--shards.seed", at.seed)
    name = f"{at.own.name}: train {system}"
    return stages.lora(name, at.base, at.own / system, mix, steps, at.nproc, *seeds, *more)


def candidates(at: Place) -> Mapping[str, list[Candidate]]:
    """What the row of each merging method is chosen from, by the method's row; those of `below` are only looked at."""
    folder = at.own / "candidates"
    layers = [
        Candidate(f"layerwise-{keep}-{q:g}", folder / f"layerwise-{keep}" / f"quantile-{q:g}", q)
        for keep in ("above", "below")
        for q in QUANTILES
    ]
    return {
        "layerwise": layers[: len(QUANTILES)],
        "layerwise-below": layers[len(QUANTILES) :],
        "task-arithmetic": [Candidate(f"task-arithmetic-{w:g}", folder / f"task-arithmetic-{w:g}", w) for w in WEIGHTS],
        "ties": [Candidate(f"ties-{d:g}", folder / f"ties-{d:g}", d) for d in DENSITIES],
        "dare": [Candidate(f"dare-{d:g}", folder / f"dare-{d:g}", d) for d in DENSITIES],
    }


def _merges(at: Place) -> list[Stage]:
    """Candidates of every method, judged on A's validation images, and the best of each."""
    given = candidates(at)
    folder, scores = at.own / "candidates", at.own / "candidates-judged"
    sweep = ",".join(f"{q:g}" for q in QUANTILES)
    made = [
        _merge(at, f"layerwise {keep}", folder / f"layerwise-{keep}", "layerwise", "--keep", keep, "--sweep", sweep)
        for keep in ("above", "below")
    ]
    for one in given["task-arithmetic"]:
        made.append(_merge(at, one.name, one.folder, "task-arithmetic", "--weight", one.value))
    for one in given["ties"]:
        made.append(_merge(at, one.name, one.folder, "ties", "--density", one.value, "--rank", FULL_RANK))
    for one in given["dare"]:
        more = ("--density", one.value, "--rank", FULL_RANK, "--seed", at.seed)
        made.append(_merge(at, one.name, one.folder, "dare-linear", *more))
    everyone = {one.name: one.folder for group in given.values() for one in group}
    systems: dict[str, Path | None] = {"base": None, "lora": at.adapter("lora"), **everyone}
    judged = stages.evaluate(at.base, systems, at.set("a-val"), scores, at.nproc, "--tasks", TASKS)
    chosen = at.own / "chosen"
    rows = {row: given[row] for row in _CHOSEN}
    return [
        *made,
        replace(judged, name=f"{at.own.name}: judge the candidates"),
        Stage(f"{at.own.name}: choose", chosen, lambda: choose(rows, scores, chosen)),
    ]


def _merge(at: Place, name: str, out: Path, method: str, *more: object) -> Stage:
    command = stages.program("cogvlm_hpe", "merge", "--base", at.base, "--adapter", at.adapter("lora"))
    return _named(at, f"merge {name}", out, [*command, "--method", method, *map(str, more), "--out", str(out)])


def _judged(at: Place, on: str, with_base: bool) -> list[Stage]:
    """The language model's systems in one pass, and the crop networks. A name tells the seed, but for the base's."""
    out = at.root / "evaluation" / on
    names = [*REHEARSAL, *_CHOSEN, *(f"{system}-continued" for system in CONTINUED)]
    systems: dict[str, Path | None] = {"base": None} if with_base else {}
    systems |= {f"{name}-seed-{at.seed}": at.adapter(name) for name in names}
    models = stages.evaluate(at.base, systems, at.set(on), out, at.nproc, "--tasks", TASKS)
    stages_ = [replace(models, name=f"{at.own.name}: evaluate on {on}")]
    for name in CROPS:
        named = f"{name}-seed-{at.seed}"
        judged = stages.evaluate(at.own / name, {named: None}, at.set(on), out / named, at.nproc, "--tasks", "pose")
        stages_.append(replace(judged, name=f"{at.own.name}: evaluate {name} on {on}"))
    return stages_


def report(out: Path, runs: Sequence[Path], about: str) -> Stage:
    """report.html of `runs` in `out`; `about` is the file here that says what each system is."""
    command = stages.program("cogvlm_hpe", "report", *runs, "--systems", ABOUT / about, "--out", out)

    def is_newest(page: Path) -> bool:
        made_s = page.stat().st_mtime if page.exists() else 0.0
        return all(path.stat().st_mtime <= made_s for run in runs for path in run.rglob("metrics.json"))

    return Stage(f"report of {out.name}", out / "report.html", command, is_newest)
