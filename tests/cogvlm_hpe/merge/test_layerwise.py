"""Which layers stay: both directions, sweeps, two adapters, and the same choice for any number of threads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from merging import choose, make_adapter, make_base, make_tower, run, tuned_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogvlm_hpe.merge import factors, layerwise, products, settings
from cogvlm_hpe.merge.base import Base
from launcher.errors import UsageError, UserError


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base")


def rows_of(out: Path) -> dict[str, dict]:
    return {row["layer"]: row for row in json.loads((out / "merge.json").read_text())["layers"]}


@pytest.mark.parametrize(("quantile", "above", "below"), [(0.0, 9, 1), (0.5, 5, 5), (0.6, 4, 5), (1.0, 1, 9)])
def test_both_directions_keep_whole_layers(tmp_path: Path, base: Base, quantile: float, above: int, below: int) -> None:
    path = make_adapter(tmp_path / "a")
    for keep, count in (("above", above), ("below", below)):
        [(_, merged)] = choose(base, [path], quantile=quantile, keep=keep)
        threshold = merged.record["threshold"]
        kept = {choice.layer for choice in merged.choices if choice.tuned}
        assert len(kept) == count and kept == set(merged.changes.layers())
        side = np.greater_equal if keep == "above" else np.less_equal
        assert len(merged.choices) == 9
        assert all(side(choice.similarity, threshold) == (choice.layer in kept) for choice in merged.choices)
        assert any(choice.similarity == threshold for choice in merged.choices)


def test_a_threshold_that_no_layer_is_below_is_refused(tmp_path: Path, base: Base) -> None:
    with pytest.raises(UserError, match=r"no layer is at similarity -1 or below \(lowest: 0\.\d+\)"):
        run(base, [make_adapter(tmp_path / "a")], tmp_path / "out", "--threshold", "-1", "--keep", "below")


def test_a_sweep_holds_what_single_merges_write(tmp_path: Path, base: Base) -> None:
    path, out = make_adapter(tmp_path / "a"), tmp_path / "sweep"
    run(base, [path], out, "--sweep", "0.25,0.75", "--keep", "below")
    assert sorted(p.name for p in out.iterdir()) == ["quantile-0.25", "quantile-0.75", "sweep.json", "sweep.md"]
    for quantile in ("0.25", "0.75"):
        name = f"quantile-{quantile}"
        run(base, [path], tmp_path / "alone" / name, "--quantile", quantile, "--keep", "below")
        for file in (path for path in (tmp_path / "alone" / name).rglob("*") if path.is_file()):
            assert (out / name / file.relative_to(tmp_path / "alone" / name)).read_bytes() == file.read_bytes()
    table = json.loads((out / "sweep.json").read_text())
    assert [row["tuned"] for row in table] == [3, 7] and (out / "sweep.md").read_text().count("| quantile-") == 2


def test_a_sweep_reads_the_base_once(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    real = Base.rows
    monkeypatch.setattr(Base, "rows", lambda self, layer, *ends: (reads.append(layer), real(self, layer, *ends))[1])
    names = [name for name, _ in choose(base, [make_adapter(tmp_path / "a")], sweep=[0.1, 0.5, 0.9])]
    assert names == ["quantile-0.1", "quantile-0.5", "quantile-0.9"]
    assert sorted(reads) == sorted(set(reads)) and len(reads) == 9


def test_a_sweep_of_thresholds_names_the_one_that_keeps_nothing(tmp_path: Path, base: Base) -> None:
    path = make_adapter(tmp_path / "a")
    run(base, [path], tmp_path / "out", "--sweep-thresholds", "0.2,0.20000000001")
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"threshold-0.2", "threshold-0.20000000001"}
    with pytest.raises(UserError, match=r"threshold-1: no layer is at similarity 1 or above"):
        run(base, [path], tmp_path / "no", "--sweep-thresholds", "0.2,1")
    assert not (tmp_path / "no").exists()


def test_of_two_adapters_each_layer_is_one_of_theirs(tmp_path: Path, base: Base) -> None:
    first = make_adapter(tmp_path / "a")
    second = make_adapter(tmp_path / "b", seed=2, r=3, target_modules=["query_key_value", "dense", "down_proj"])
    run(base, [first, second], tmp_path / "out", "--quantile", "0.5")
    plain, old, new = make_tower().double().state_dict(), tuned_weights(first), tuned_weights(second)
    after, rows = tuned_weights(tmp_path / "out"), rows_of(tmp_path / "out")
    assert len(rows) == 6 and {row["winner"] for row in rows.values()} == {"tuned", "base"}
    for layer, row in rows.items():
        changes = [(side[layer] - plain[f"{layer}.weight"]).flatten() for side in (old, new)]
        assert row["similarity"] == pytest.approx(float(torch.cosine_similarity(*changes, dim=0)), abs=1e-9)
        wanted = new if row["winner"] == "tuned" else old
        torch.testing.assert_close(after[layer], wanted[layer], rtol=0, atol=1e-12)
    for layer, side in (("layers.0.mlp.up_proj", old), ("layers.0.mlp.down_proj", new)):  # only one has it
        torch.testing.assert_close(after[layer], side[layer], rtol=0, atol=1e-12)


def test_two_adapters_without_a_common_layer_are_refused(tmp_path: Path, base: Base) -> None:
    first = make_adapter(tmp_path / "a", target_modules=["up_proj"])
    second = make_adapter(tmp_path / "b", target_modules=["down_proj"])
    with pytest.raises(UserError, match="no layer in common"):
        run(base, [first, second], tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_and_the_same_bits_for_any_threads(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = factors.read_adapter(make_adapter(tmp_path / "a"))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(products.base_and_tuned(base, adapter.factors))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    for layer, factor in adapter.factors.items():
        plain = base.weights.read(f"{layer}.weight").double()
        tuned = plain + factor.delta()
        dense = [float((x * y).sum()) for x, y in ((plain, plain), (plain, tuned), (tuned, tuned))]
        assert list(vars(found[0][layer]).values()) == pytest.approx(dense, rel=1e-12)


def test_similarity_of_changes_needs_no_base() -> None:
    torch.manual_seed(1)
    one, other = (factors.Factor(torch.randn(r, 40), torch.randn(30, r), s) for r, s in ((3, 0.5), (7, -2.0)))
    found = products.of_changes(one, other)
    x, y = one.delta(), other.delta()
    assert found.cross == pytest.approx(float((x * y).sum()), rel=1e-12)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)), abs=1e-12)


def test_a_yaml_file_says_the_same_as_flags_and_flags_win(tmp_path: Path, base: Base) -> None:
    path = make_adapter(tmp_path / "a")
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump({"method": "layerwise", "keep": "below", "quantile": 0.3, "granularity": "block"}))
    run(base, [path], tmp_path / "out", "--config", str(file), "--quantile", "0.6")
    merge = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (merge["keep"], merge["granularity"], merge["quantile"]) == ("below", "block", 0.6)


def test_the_packaged_recipe_is_the_methods_defaults() -> None:
    """It may be edited and used as it is; what it spells out is what the flags' defaults do."""
    path = Path(settings.__file__).parents[1] / "configs" / "merge.yaml"
    recipe = settings.from_mapping(settings.read_yaml(path), str(path))
    settings.check(recipe)
    plain = settings.Settings(recipe.base, recipe.adapter, recipe.out, quantile=layerwise.DEFAULT_QUANTILE)
    assert recipe == plain and recipe.method == "layerwise"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold: 0.9", "treshold: no such key; known are adapter, base"),
        ("threshold: high", "threshold: 'high' is no float"),
        ("keep: [above]", "is no str"),
        ("keep: over", "--keep over: must be one of above, below"),
        ("- a", "holds no keys"),
        ("a: [", "no readable YAML"),
    ],
)
def test_yaml_that_cannot_be_meant(tmp_path: Path, base: Base, text: str, message: str) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        run(base, [make_adapter(tmp_path / "a")], tmp_path / "out", "--config", str(tmp_path / "merge.yaml"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--quantile", "0.5", "--sweep", "0.5"),
        ("--sweep", "0.5", "--sweep-thresholds", "0.5"),
        ("--threshold", "0.5", "--quantile", "0.5"),
        ("--method", "ties"),
        ("--method", "ties", "--density", "0"),
        ("--method", "cat", "--keep", "below"),
        ("--method", "cat", "--density", "0.5"),
        ("--t", "0.2"),
        ("--rank", "4"),
        ("--method", "ties", "--density", "0.5", "--gamma", "0.1"),
        ("--method", "breadcrumbs", "--density", "0.5", "--seed", "1"),
        ("--sweep", "0.5,0.5"),
        ("--method", "cat", "--output", "hf", "--max-shard-gb", "nan"),
        ("--method", "linear", "--weight", "nan"),
        ("--method", "linear", "--layer-weight", "*=inf"),
    ],
)
def test_flags_that_exclude_each_other(tmp_path: Path, base: Base, flags: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        run(base, [make_adapter(tmp_path / "a")], tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_tensorboard_shows_the_heatmap_and_the_table(tmp_path: Path, base: Base) -> None:
    run(base, [make_adapter(tmp_path / "a")], tmp_path / "out")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    [picture] = events.Images("merge/heatmap")
    assert picture.encoded_image_string == (tmp_path / "out" / "heatmap.png").read_bytes()
    [table] = events.Tensors("merge/layers/text_summary")
    assert table.tensor_proto.string_val[0].decode() == (tmp_path / "out" / "merge.md").read_text()


def test_groups_of_layers() -> None:
    layer = "model.layers.3.self_attn.language_expert_dense"
    assert layerwise.group_of(layer, "projection") == layer
    assert layerwise.group_of(layer, "module") == "model.layers.3.self_attn"
    assert layerwise.group_of(layer, "block") == "model.layers.3"
