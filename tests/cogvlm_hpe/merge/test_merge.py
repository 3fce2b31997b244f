"""The merge job on adapters that peft itself made: identities, exactness, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from merging import make_adapter, make_base, make_tower, run, tuned_weights
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from cogvlm_hpe.merge import arithmetic, factors, layerwise, products
from cogvlm_hpe.merge import settings as known
from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.load import load
from cogvlm_hpe.train.adapter import target_modules
from launcher.errors import UsageError, UserError
from launcher.files import sha256


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base")


VARIANTS = [
    {},
    {"r": 8, "use_rslora": True},
    {"rank_pattern": {"dense": 2}, "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 3, "dense": 32}},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_factors_give_the_weights_that_peft_gives(tmp_path: Path, options: dict) -> None:
    path = make_adapter(tmp_path / "a", **options)
    plain, tuned = make_tower().double().state_dict(), tuned_weights(path)
    read = factors.read_adapter(path).factors
    assert len(read) == 9
    for name, factor in read.items():
        torch.testing.assert_close(plain[f"{name}.weight"] + factor.delta(), tuned[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
def test_one_adapter_with_weight_one_is_that_adapter(tmp_path: Path, base: Base, options: dict) -> None:
    path, out = make_adapter(tmp_path / "a", **options), tmp_path / "out"
    assert run(base, [path], out, "--method", "task-arithmetic") == 0
    before, after = tuned_weights(path), tuned_weights(out)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-12)
    stored, written = load_file(path / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert stored.keys() == written.keys() and all(torch.equal(stored[key], written[key]) for key in stored)
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (path, out))
    assert [old[key] for key in ("r", "use_rslora")] == [new[key] for key in ("r", "use_rslora")]
    if not options.get("rank_pattern"):
        assert new["lora_alpha"] == old["lora_alpha"]


def test_sum_of_adapters_has_no_cross_terms(tmp_path: Path, base: Base) -> None:
    first, second = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", seed=2, r=3, target_modules=["dense"])
    run(base, [first, second], tmp_path / "out", "--method", "task-arithmetic", "--weight", "0.5", "--weight", "-2")
    parts = [factors.read_adapter(path).factors for path in (first, second)]
    plain, summed = make_tower().double().state_dict(), tuned_weights(tmp_path / "out")
    for name in parts[0]:
        wanted = plain[f"{name}.weight"] + 0.5 * parts[0][name].delta()
        if name in parts[1]:
            wanted = wanted - 2 * parts[1][name].delta()
        torch.testing.assert_close(summed[name], wanted, rtol=0, atol=1e-6)


def scaled(read: factors.Factors, weight: float) -> dict[str, factors.Factor]:
    return arithmetic.weighted_sum([read], [dict.fromkeys(read, weight)])


def test_scaling_is_exact_and_weight_zero_is_the_base(tmp_path: Path, base: Base) -> None:
    read = factors.read_adapter(make_adapter(tmp_path / "a"))
    for name, factor in scaled(read.factors, 0.25).items():
        assert torch.equal(factor.delta(), 0.25 * read.factors[name].delta())
    run(base, [read.path], tmp_path / "out", "--method", "task-arithmetic", "--weight", "0")
    plain, after = make_tower().double().state_dict(), tuned_weights(tmp_path / "out")
    assert all(torch.equal(after[name], plain[f"{name}.weight"]) for name in read.factors)


@pytest.mark.parametrize("granularity", known.GRANULARITIES)
def test_similarities_equal_dense_float64_cosines(tmp_path: Path, base: Base, granularity: str, monkeypatch) -> None:
    monkeypatch.setattr("cogvlm_hpe.merge.products.READ_ELEMENTS", 24 * 7)  # several pieces a layer
    monkeypatch.setattr("cogvlm_hpe.merge.products._STEP_ELEMENTS", 24 * 3)  # several steps a piece
    adapter = factors.read_adapter(make_adapter(tmp_path / "a"))
    plain, tuned = make_tower().double().state_dict(), tuned_weights(adapter.path)
    found = layerwise.similarities(base, adapter.factors, granularity)
    for group, similarity in found.items():
        names = [name for name in adapter.factors if layerwise.group_of(name, granularity) == group]
        old = torch.cat([plain[f"{name}.weight"].flatten() for name in names])
        new = torch.cat([tuned[name].flatten() for name in names])
        assert similarity == pytest.approx(float(torch.cosine_similarity(old, new, dim=0)), abs=1e-12)
    assert len(found) == {"projection": 9, "module": 6, "block": 3}[granularity]


def test_an_adapter_that_changes_nothing_has_similarity_one(tmp_path: Path, base: Base) -> None:
    read = factors.read_adapter(make_adapter(tmp_path / "a"))
    found = layerwise.similarities(base, scaled(read.factors, 0.0), "projection")
    assert all(value == pytest.approx(1.0, abs=1e-15) for value in found.values())


def test_a_negated_layer_has_similarity_minus_one() -> None:
    torch.manual_seed(3)
    a, b = torch.randn(5, 24), torch.randn(24, 5)
    weight = b.double() @ a.double()
    factor = factors.Factor(a, b, -2.0)
    squares, cross = products.piece(weight, a.double(), b.double())
    whole = products.Products(squares, squares - 2 * cross, squares - 4 * cross + products.inner(factor, factor))
    assert whole.cosine == pytest.approx(-1.0, abs=1e-12)


def test_winner_takes_all_keeps_whole_layers_and_plain_peft_loads_them(tmp_path: Path, base: Base) -> None:
    path, out = make_adapter(tmp_path / "a"), tmp_path / "out"
    run(base, [path], out, "--quantile", "0.6")
    merge = json.loads((out / "merge.json").read_text())
    plain, tuned, after = make_tower().double().state_dict(), tuned_weights(path), tuned_weights(out)
    assert {layer["winner"] for layer in merge["layers"]} == {"tuned", "base"}
    for layer in merge["layers"]:
        stays = layer["similarity"] >= merge["threshold"]
        assert layer["winner"] == ("tuned" if stays else "base")
        wanted = tuned[layer["layer"]] if stays else plain[f"{layer['layer']}.weight"]
        torch.testing.assert_close(after[layer["layer"]], wanted, rtol=0, atol=1e-12)
    assert merge["tuned"] == sum(layer["winner"] == "tuned" for layer in merge["layers"]) == 4


def test_the_folder_holds_all_its_files_and_carries_hpe_json_over(tmp_path: Path, base: Base) -> None:
    path, out = make_adapter(tmp_path / "a"), tmp_path / "out"
    (path / "hpe.json").write_text(json.dumps({"scope": "text", "scores": {"geodesic_deg": 3.0}}))
    run(base, [path], out)
    wanted = (
        "README.md adapter_config.json adapter_model.safetensors heatmap.png hpe.json merge.json merge.md tensorboard"
    )
    assert sorted(file.name for file in out.iterdir()) == wanted.split()
    hpe = json.loads((out / "hpe.json").read_text())
    assert hpe["scope"] == "text" and hpe["merge"]["method"] == "layerwise" and "scores" not in hpe
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.path.resolve())
    assert (out / "merge.md").read_text().count("| layers.") == 9
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "merged by `layerwise`" in card and f"torch {torch.__version__}" in card
    assert f"`a`, weight 1, sha256 `{sha256(path / 'adapter_model.safetensors')}`" in card
    assert f"fingerprint `{fingerprint(base.path)}`" in card


@pytest.mark.parametrize(
    ("flags", "files"), [([], 8), (["--method", "dare-ties", "--density", "0.5", "--rank", "6"], 6)]
)
def test_the_same_merge_gives_the_same_bytes(tmp_path: Path, base: Base, flags: list[str], files: int) -> None:
    path = make_adapter(tmp_path / "a")
    for parent in ("one", "two"):
        run(base, [path], tmp_path / parent / "out", *flags)
    written = [file for file in (tmp_path / "one" / "out").rglob("*") if file.is_file()]
    assert len(written) == files
    for file in written:
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes(), file.name


def test_nothing_stays_tuned_is_refused_and_leaves_nothing(tmp_path: Path, base: Base) -> None:
    path, out = make_adapter(tmp_path / "a"), tmp_path / "out"
    with pytest.raises(UserError, match=r"no layer is at similarity 1 or above \(highest: 0\.\d+\).*move --threshold"):
        run(base, [path], out, "--threshold", "1.0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_nan_in_the_base_names_the_layer(tmp_path: Path, base: Base) -> None:
    weights = load_file(base.path / "model.safetensors")
    weights["layers.1.attention.dense.weight"][3, 3] = torch.nan
    save_file(weights, base.path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.attention\.dense: similarity nan"):
        run(base, [make_adapter(tmp_path / "a")], tmp_path / "out")


def test_nan_in_the_adapter_names_the_layer(tmp_path: Path, base: Base) -> None:
    path = make_adapter(tmp_path / "a")
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.layers.2.mlp.up_proj.lora_B.weight"][0, 0] = torch.inf
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj: lora_B holds NaN or infinity"):
        run(base, [path], tmp_path / "out")


def test_a_layer_that_the_base_lacks_is_named(tmp_path: Path, base: Base) -> None:
    weights = load_file(base.path / "model.safetensors")
    del weights["layers.2.mlp.up_proj.weight"]
    save_file(weights, base.path / "model.safetensors")
    with pytest.raises(UserError, match=r"layer layers\.2\.mlp\.up_proj is not in base"):
        run(base, [make_adapter(tmp_path / "a")], tmp_path / "out")


def test_a_base_of_another_width_is_refused(tmp_path: Path, base: Base) -> None:
    weights = load_file(base.path / "model.safetensors")
    weights["layers.0.attention.dense.weight"] = torch.zeros(24, 12)
    save_file(weights, base.path / "model.safetensors")
    with pytest.raises(UserError, match=r"the base's weight is 24x12, the adapter's 24x24"):
        run(base, [make_adapter(tmp_path / "a")], tmp_path / "out")


def test_another_base_is_refused_by_fingerprint(tmp_path: Path, base: Base) -> None:
    path = make_adapter(tmp_path / "a")
    (path / "hpe.json").write_text(json.dumps({"base_fingerprint": fingerprint(base.path)}))
    run(base, [path], tmp_path / "fits")
    (path / "hpe.json").write_text(json.dumps({"base_fingerprint": "a" * 64}))
    with pytest.raises(UserError, match="was trained on another base"):
        run(base, [path], tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"use_dora": True}, "use_dora = True: only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "it changes the base"),
        ({"peft_type": "LOHA"}, "only LORA adapters"),
        ({"r": 5}, "says rank 5, the file holds 4"),
        ({"lora_alpha": None}, "has no number lora_alpha"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(tmp_path: Path, spoil: dict, message: str) -> None:
    path = make_adapter(tmp_path / "a")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | spoil))
    with pytest.raises(UserError, match=message):
        factors.read_adapter(path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter_config.json: no such file"):
        factors.read_adapter(tmp_path)
    path = make_adapter(tmp_path / "a")
    whole = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: .*save the adapter again"):
        factors.read_adapter(path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "task-arithmetic", "--quantile", "0.5"],
        ["--weight", "0.5"],
        ["--quantile", "1.5"],
        ["--method", "task-arithmetic", "--weight", "1", "--weight", "2"],
    ],
)
def test_flags_that_cannot_be_meant_are_usage_errors(tmp_path: Path, base: Base, flags: list[str]) -> None:
    with pytest.raises(UsageError):
        run(base, [make_adapter(tmp_path / "a")], tmp_path / "out", *flags)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, base: Base) -> None:
    with pytest.raises(UserError, match="exists already"):
        run(base, [make_adapter(tmp_path / "a")], base.path)


@pytest.mark.slow
def test_a_merged_adapter_answers_as_its_layers_say(tmp_path: Path, tiny_set: Callable[..., Path]) -> None:
    base = write_tiny_model(tmp_path / "base", tiny_set(samples=8), steps=0)
    lora = _cogvlm_adapter(base, tmp_path / "lora")
    pixels, prompts = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)), [[5, 9, 300], [7, 8]]

    def answers(adapter: Path | None) -> list[list[int]]:
        return load(base, adapter).model.answer(pixels, [0, 0], prompts, 12)

    run(Base(base), [lora], tmp_path / "all", "--quantile", "0")
    run(Base(base), [lora], tmp_path / "none", "--method", "task-arithmetic", "--weight", "0")
    run(Base(base), [lora], tmp_path / "half")
    assert answers(tmp_path / "all") == answers(lora) != answers(None) == answers(tmp_path / "none")
    kept = load(base, tmp_path / "half").model
    tuned = sorted(name for name, module in kept.named_modules() if hasattr(module, "lora_A"))
    assert tuned == json.loads((tmp_path / "half" / "adapter_config.json").read_text())["target_modules"]
    assert kept.adapter_scope == "text" and len(tuned) == 2


def _cogvlm_adapter(base: Path, folder: Path) -> Path:
    model = load(base).model
    lora = peft.LoraConfig(r=4, target_modules=target_modules(model, ["language.attention"]))
    tuned = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    tuned.save_pretrained(folder)
    notes = {"scope": "text", "answer_format": "offset", "base_fingerprint": fingerprint(base)}
    (folder / "hpe.json").write_text(json.dumps(notes))
    return folder
