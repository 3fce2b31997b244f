"""results.md: the table, the paper's claims one by one, what was chosen and what the sweeps say."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cogvlm_hpe import stages
from cogvlm_hpe.evaluate import plots, rendering
from cogvlm_hpe.evaluate.rendering import Section
from cogvlm_hpe.evaluate.report_command import read_about
from cogvlm_hpe.evaluate.results import load_results
from cogvlm_hpe.evaluate.systems import in_order, overview, systems_of
from cogvlm_hpe.paper import claims
from cogvlm_hpe.paper.choose import CHOICE, tasks_of
from cogvlm_hpe.paper.plan import ABOUT, CROPS, PROBE, TESTS, Place, Sizes, candidates

TITLE = "What the paper claims, at laptop size"


def write(out: Path, root: Path, sizes: Sizes, seeds: Sequence[int]) -> None:
    """Write `out`, a Markdown file, with its pictures in a folder beside it, from the comparison in `root`."""
    parts = sections(root, sizes, seeds)
    pictures = out.with_suffix("")
    rendering.write_pictures(parts, pictures)
    rendering.replace_file(out, rendering.markdown(parts, TITLE, pictures.name))


def sections(root: Path, sizes: Sizes, seeds: Sequence[int]) -> list[Section]:
    """What it says, in reading order."""
    about = read_about(ABOUT / "systems.yaml")
    results = in_order(load_results(root / "evaluation" / on for on in TESTS), about)
    results = [result for result in results if result.seed in (None, *seeds)]
    places = [Place(root, sizes, 0, seed) for seed in seeds]
    systems, found = systems_of(results), claims.findings(results)
    parts = [
        Section("In short", terms=_verdicts(found)),
        Section("What was run", _ran(sizes, seeds)),
        Section("Result", _RESULT, overview=overview(results, about)),
        *_picture("Pose and grounding", "both", plots.pose_and_grounding(systems), plots.UPPER_LEFT),
        *_picture("Errors", "errors", plots.geodesic_bars(systems)),
        Section("The claims", _CLAIMS, table=_claims_table(found)),
        Section("What the base's image tokens hold", _PROBE, table=_probe_table(root)),
        Section("Cost", _COST, table=_cost_table(root, list(about), places)),
        Section("What was chosen", _CHOSEN, table=_choice_table(places)),
    ]
    judged = load_results([places[0].own / "candidates-judged"])
    sweep = plots.merge_sweep([result for result in judged if "above" in result.name])
    parts += _picture("Threshold of the layer-based merge, on A's validation images, first seed", "threshold", sweep)
    tried = root / "sweeps" / "evaluation"
    if tried.is_dir():
        said = read_about(ABOUT / "sweeps.yaml")
        parts.append(Section("Sweeps", _SWEEPS, overview=overview(in_order(load_results([tried]), said), said)))
    return [*parts, Section("Read with care", terms=_CARE)]


def _ran(sizes: Sizes, seeds: Sequence[int]) -> str:
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return (
        f"`cogvlm-hpe paper`, {which}: {sizes.train_scenes} training scenes of domain A, "
        f"{sizes.weak_scenes} crowded scenes (W) whose poses the crop network has said, {sizes.test_scenes} test "
        f"scenes each of A, B and C, {sizes.val_scenes} validation scenes of A; {sizes.cnn_steps} steps for the crop "
        f"network, {sizes.weak_steps} on weak and {sizes.max_steps} on true labels for LoRA, {sizes.continued_steps} "
        f"of continued training. The base was made from {sizes.a_base_scenes} other scenes of A and "
        f"{sizes.b_base_scenes} of B, which the control `cnn-more-heads` is taught as well. All people of the test "
        "sets are unseen; B has other backgrounds, light and lens, C shows dolls. Every number here is this project's "
        "own; none is the paper's."
    )


_RESULT = (
    "Geodesic error and MAE in degrees; grounding is the share of objects found (IoU ≥ 0.5); not a pose, not a box: "
    "the share of such questions answered by anything else, which count as the constant pose and as not found, and of "
    "those that mix the formats. ± is the standard deviation over seeds, in brackets the 95 % interval from resampling "
    "images. The best of each column is in bold."
)
_CLAIMS = (
    "Differences on the same questions, seeds as one system, with 95 % intervals from resampling images. A claim is "
    "*shown* where every interval lies on its side of zero, *the opposite* where one lies on the other, else *not "
    "shown*."
)
_PROBE = (
    "Mean geodesic error in degrees of a linear read-out (ridge regression on A's training heads, from nine points "
    "inside the head's box), behind the vision tower and behind the adapter. LoRA here changes text tokens alone: "
    "this much there is to be read, and where its rows err more, the reading is at fault, not the seeing."
)
_COST = (
    "Numbers that are trained, and wall time of a seed's own stages on the machine that ran it, its mean over seeds."
)
_CHOSEN = (
    "By A's validation images alone; means over seeds. The cost of a candidate is its pose error as a share of the "
    "constant pose's, minus its grounding as a share of the base's: −1 is perfect. The rule is ours. `below` puts the "
    "layers back that changed least instead of those that changed most, which is not what the paper does; it is only "
    "looked at."
)
_SWEEPS = "One thing of LoRA's training changed at a time, one seed. Differences of a few degrees may be chance."
_CARE = {
    "size": "A base of three million parameters says what the method does, not what seventeen billion would do.",
    "few layers": "LoRA changes twenty matrices in four decoder layers here, so that a merge that puts layers back has "
    "twenty switches, each of which holds much of a skill; the same LoRA on CogVLM has 160. Of all claims (d) may "
    "suffer most from this.",
    "taught directions": "The base's vision tower was taught the rotation of each head beside all else that stands in "
    "the image, on scenes of A and of B with people of their own; CogVLM's was not. The crop network has seen A alone, "
    "so (a) compares what the two were given as much as what they are. Its control was given the same heads: where it "
    "errs less, what the base had seen may be all of the lead.",
    "dolls": "C is reported and claims nothing: no system has seen dolls.",
    "weak labels": "The language model has seen W, whose poses the crop network has said; the crop network has only A.",
    "choices": "Prompts, ratios, thresholds and the continued stage are ours where the paper's public text gives none.",
    "seeds": "They change weights, order and the crop network's labels, not the scenes. The intervals are over images "
    "and hold nothing of what another seed would change: with few seeds a verdict may still turn.",
}


Found = Mapping[str, Sequence[claims.Finding]]


def _verdicts(found: Found) -> dict[str, str]:
    return {f"({name}) {text}": claims.verdict(found[name]) for name, text in claims.CLAIMS.items()}


def _claims_table(found: Found) -> tuple[list[str], list[list[str]]]:
    rows = [[name, one.text, one.difference, one.side] for name, some in found.items() for one in some]
    return ["claim", "what is compared", "difference", "which is"], rows


def _picture(title: str, name: str, png: bytes | None, text: str = "") -> list[Section]:
    return [Section(title, text, picture=(name, png))] if png else []


def _probe_table(root: Path) -> tuple[list[str], list[list[str]]]:
    errors = json.loads((root / PROBE).read_text())
    return ["read behind", *TESTS], [[where, *(f"{of[on]:.1f}°" for on in TESTS)] for where, of in errors.items()]


def _cost_table(root: Path, systems: Sequence[str], places: Sequence[Place]) -> tuple[list[str], list[list[str]]]:
    took_s = stages.seconds(root)
    rows = []
    for system in systems:
        trained, minutes = _trained(places[0], system), []
        for place in places:
            own = {f"{place.own.name}: {words}" for words in _stages_of(system)}
            minutes.append(sum(value for name, value in took_s.items() if name in own) / 60)
        rows.append([system, f"{trained:,}" if trained else "–", f"{sum(minutes) / len(minutes):.1f}"])
    return ["system", "trained numbers", "minutes"], rows


def _stages_of(system: str) -> list[str]:
    return [system] if system in CROPS else [f"train {system}", f"train {system}-weak"]


_COUNTED = ("running_mean", "running_var", "num_batches_tracked")
"""What batch norm counts, and nobody trains."""


def _trained(at: Place, system: str) -> int:
    """Numbers in what a training has left; 0 for a system that trained nothing."""
    from safetensors import safe_open

    folder = at.own / system
    path = folder / "model.safetensors" if system in CROPS else folder / "last" / "adapter_model.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, framework="np") as file:
        names = [name for name in file.keys() if not name.endswith(_COUNTED)]  # noqa: SIM118 (not a dict)
        shapes = [file.get_slice(name).get_shape() for name in names]
    return sum(_product(shape) for shape in shapes)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _choice_table(places: Sequence[Place]) -> tuple[list[str], list[list[str]]]:
    choices = [json.loads((at.own / "chosen" / CHOICE).read_text()) for at in places]
    rows = []
    for row, given in candidates(places[0]).items():
        for one in given:
            judged = [tasks_of(at.own / "candidates-judged", one.name) for at in places]
            error_deg = np.mean([tasks["pose"]["all"]["geodesic"]["mean"] for tasks in judged])
            found = np.mean([tasks["where"]["accuracy"]["mean"] for tasks in judged])
            costs = [choice["cost"][row][one.name] for choice in choices if row in choice["cost"]]
            taken = [
                str(at.seed)
                for at, choice in zip(places, choices, strict=True)
                if choice["chosen"].get(row, {}).get("name") == one.name
            ]
            cost = f"{np.mean(costs):+.3f}" if costs else "–"
            rows.append([one.name, f"{error_deg:.1f}°", f"{100 * found:.1f} %", cost, ", ".join(taken) or "–"])
    return ["candidate", "pose error", "grounding", "cost", "chosen by seed"], rows
