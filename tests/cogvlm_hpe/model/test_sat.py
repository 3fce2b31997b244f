"""SAT checkpoints read as they are: names, configuration, model-parallel parts, LoRA; the original logits from each."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_hpe.merge.factors import Factor
from cogvlm_hpe.model import sat
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.convert import Source, merged
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.sat_lora import factors_of, pairs_of
from cogvlm_hpe.model.sat_weights import SatWeights
from cogvlm_hpe.model.weights import Weights, open_weights, read_config
from launcher.errors import UserError

DATA = Path(__file__).parents[2] / "data" / "tiny0"
CASES = ("image_text", "batch_padded", "prefix_text", "two_images", "text_only", "left_padded")
FORMS = ("sat", "sat_mp2", "sat_lora")  # of sat_lora, the base
TOLERANCE = 1e-4


@cache
def oracle(name: str) -> dict:
    return torch.load(DATA / f"{name}.pt", weights_only=True)


@cache
def meta_names() -> dict[str, tuple[int, ...]]:
    """Every parameter of the published 17.6 B model."""
    with torch.device("meta"):
        model = CogVLMForCausalLM(CogVLMConfig())
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def model_of(weights: Weights) -> CogVLMForCausalLM:
    model = CogVLMForCausalLM(weights.config)
    model.load_state_dict({name: weights.read(name) for name in weights.names()})
    return model.eval()


def logits(model: CogVLMForCausalLM, case: str) -> torch.Tensor:
    inputs = oracle("inputs")[case]
    with torch.no_grad():
        return model(
            inputs["input_ids"], inputs["token_type_ids"], inputs["attention_mask"], inputs["images"]
        ).logits[inputs["attention_mask"] == 1]  # fmt: skip


def expected(case: str, found: dict) -> torch.Tensor:
    return found[case][oracle("inputs")[case]["attention_mask"] == 1]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_tensors(form: str) -> None:
    hf, other = open_weights(DATA / "hf"), open_weights(DATA / form)
    assert other.names() == hf.names()
    for name in hf.names():
        whole = hf.read(name)
        assert other.shape(name) == tuple(whole.shape) and other.dtype(name) == whole.dtype
        assert torch.equal(other.read(name), whole), name
        flat, size = whole.reshape(-1), whole.numel()
        for start, stop in ((0, min(64, size)), (size // 3, min(size, size // 3 + 70)), (size - 1, size)):
            assert torch.equal(other.flat(name, start, stop), flat[start:stop]), name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_one_fingerprint(form: str) -> None:
    assert fingerprint(DATA / form) == fingerprint(DATA / "hf") != fingerprint(DATA / "sat_lora_merged")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_original_logits(form: str, case: str) -> None:
    found = logits(model_of(open_weights(DATA / form)), case)
    assert (found - expected(case, oracle("logits"))).abs().max() < TOLERANCE


@pytest.mark.parametrize("how", ["merged by SAT", "merged here"])
def test_a_merged_lora_gives_the_original_logits(how: str) -> None:
    if how == "merged by SAT":
        weights = open_weights(DATA / "sat_lora_merged")
    else:
        base = SatWeights(DATA / "sat_lora")
        weights = merged(Source(base, factors_of(base.lora_parts(), 1.0))).weights
    lora = oracle("extras")["lora"]["logits"]
    assert len(lora) == 5
    for case in lora:
        assert (logits(model_of(weights), case) - expected(case, lora)).abs().max() < TOLERANCE


def test_merging_here_is_merging_in_sat() -> None:
    base = SatWeights(DATA / "sat_lora")
    here = merged(Source(base, factors_of(base.lora_parts(), 1.0))).weights
    there = open_weights(DATA / "sat_lora_merged")
    changed = [name for name in there.names() if not torch.equal(base.read(name), there.read(name))]
    assert len(changed) == 10
    for name in there.names():
        assert torch.allclose(here.read(name), there.read(name), atol=1e-6, rtol=1e-6), name


def test_names_go_both_ways_for_every_parameter_of_the_published_model() -> None:
    names = meta_names()
    assert len(names) == 1187 - 32
    assert {sat.hf_name(sat.sat_name(name)) for name in names} == set(names)
    assert len({sat.sat_name(name) for name in names}) == len(names)


def test_sat_files_name_exactly_these_parameters() -> None:
    module = torch.load(DATA / "sat/1/mp_rank_00_model_states.pt", weights_only=True)["module"]
    ours = {sat.sat_name(name) for name in open_weights(DATA / "hf").names()}
    assert ours | {sat.INV_FREQ} == set(module)
    assert torch.equal(sat.inv_freq(sat.read_sat_config(DATA / "sat")), module[sat.INV_FREQ])


@pytest.mark.parametrize("name", ["model.layers.0.weight", "lm_head.0.weight", "model.layers.x.input_layernorm.weight"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        sat.sat_name(name)


@given(
    rule=st.sampled_from(["columns", "thirds", "rows", "copy"]),
    mp_size=st.integers(1, 4),
    width=st.integers(1, 3),
    height=st.integers(1, 3),
    data=st.data(),
)
def test_merging_undoes_splitting(rule: sat.Rule, mp_size: int, width: int, height: int, data: st.DataObject) -> None:
    whole = torch.arange(3 * mp_size * height * mp_size * width).reshape(3 * mp_size * height, mp_size * width)
    parts = [sat.split(whole, rule, rank, mp_size) for rank in range(mp_size)]
    assert all(tuple(part.shape) == sat.split_shape(tuple(whole.shape), rule, mp_size) for part in parts)
    assert torch.equal(sat.merge(parts, rule), whole)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    assert torch.equal(sat.merge_flat(parts, rule, start, stop), whole.reshape(-1)[start:stop])


def test_the_parts_are_those_sat_itself_makes() -> None:
    whole = open_weights(DATA / "hf")
    for rank in range(2):
        path = DATA / f"sat_mp2/1/mp_rank_{rank:02d}_model_states.pt"
        module = torch.load(path, weights_only=True)["module"]
        for name in whole.names():
            part = sat.split(whole.read(name), sat.split_rule(name, whole.architecture.vocab_size), rank, 2)
            assert torch.equal(part, module[sat.sat_name(name)]), name


def test_only_large_vocabularies_are_split() -> None:
    assert sat.split_rule("model.embed_tokens.weight", 999) == "copy"
    assert sat.split_rule("model.embed_tokens.weight", 1000) == "columns"
    assert sat.split_rule("model.vision.linear_proj.dense_h_to_4h.weight", 32000) == "copy"


def test_config_goes_both_ways(tmp_path: Path) -> None:
    given_value = json.loads((DATA / "sat/model_config.json").read_text())
    config = sat.read_sat_config(DATA / "sat")
    value = sat.sat_config(config, 1)
    assert value.pop("template_version") == "base"
    assert value == given_value
    published = CogVLMConfig(rms_norm_eps=1e-6, template_version="chat", pad_token_id=7)
    (tmp_path / "model_config.json").write_text(json.dumps(sat.sat_config(published, 4)))
    assert read_config(tmp_path).to_dict() == {**published.to_dict(), "architectures": ["CogVLMForCausalLM"]}


def edited(folder: Path, **changes: object) -> Path:
    value = json.loads((DATA / "sat/model_config.json").read_text())
    for key, change in changes.items():
        if change is None:
            del value[key]
        else:
            value[key] = change
    (folder / "model_config.json").write_text(json.dumps(value))
    return folder


def test_absent_keys_mean_sats_defaults(tmp_path: Path) -> None:
    config = sat.read_sat_config(edited(tmp_path, bos_token_id=None, inner_hidden_size=None))
    assert (config.rms_norm_eps, config.bos_token_id, config.intermediate_size) == (1e-5, 1, 256)
    assert sat.read_sat_config(edited(tmp_path, layernorm_epsilon=1e-3)).rms_norm_eps == 1e-3
    tower = json.loads((DATA / "sat/model_config.json").read_text())["eva_args"]
    tower = {key: value for key, value in tower.items() if key != "layernorm_epsilon"} | {"image_size": [224, 224]}
    config = sat.read_sat_config(edited(tmp_path, image_length=None, eva_args=tower))
    assert config.image_tokens == 256 and config.vision_config["layer_norm_eps"] == 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eva_args": None}, "no CogVLM"),
        ({"use_bias": True}, "use_bias is True; only CogVLM's False"),
        ({"num_multi_query_heads": 8}, "num_multi_query_heads is 8"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"image_length": 17}, "image_length is 17, but 56 px in patches of 14 make 16"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sat.read_sat_config(edited(tmp_path, **changes))


def copied(tmp_path: Path, form: str) -> Path:
    return Path(shutil.copytree(DATA / form, tmp_path / form))


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = copied(tmp_path, "sat_mp2")
    (folder / "1/mp_rank_01_model_states.pt").unlink()
    with pytest.raises(UserError, match="mp_rank_01_model_states.pt is missing; copy it there"):
        open_weights(folder)
    (folder / "1/mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match="mp_rank_00_model_states.pt is missing"):
        open_weights(folder)
    (folder / "latest").unlink()
    with pytest.raises(UserError, match="latest: no such file"):
        open_weights(folder)


def test_the_shapes_say_the_model_parallel_size(tmp_path: Path) -> None:
    folder = copied(tmp_path, "sat_mp2")
    path = folder / "model_config.json"
    path.write_text(path.read_text().replace('"model_parallel_size": 2', '"model_parallel_size": 1'))
    assert fingerprint(folder) == fingerprint(DATA / "hf")
    shutil.copy(folder / "1/mp_rank_01_model_states.pt", folder / "1/mp_rank_02_model_states.pt")
    with pytest.raises(UserError, match="mp_rank_02_model_states.pt is one too many"):
        open_weights(folder)


def test_a_release_folder_is_found(tmp_path: Path) -> None:
    folder = copied(tmp_path, "sat")
    (folder / "1").rename(folder / "release")
    (folder / "latest").write_text("release\n")
    assert len(open_weights(folder).names()) == 75


def test_foreign_tensors_are_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "sat")
    path = folder / "1/mp_rank_00_model_states.pt"
    module = torch.load(path, weights_only=True)["module"]
    torch.save({"module": module | {"mixins.ptuning.past": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="1 tensors are not CogVLM's, the first mixins.ptuning.past"):
        open_weights(folder)
    torch.save(module, path)
    with pytest.raises(UserError, match="no 'module'"):
        open_weights(folder)


def test_an_unmerged_lora_over_several_files_is_base_only(tmp_path: Path) -> None:
    folder = copied(tmp_path, "sat_mp2")
    for rank in range(2):
        path = folder / f"1/mp_rank_{rank:02d}_model_states.pt"
        module = torch.load(path, weights_only=True)["module"]
        dense = "transformer.layers.0.attention.dense"
        module[f"{dense}.original.weight"] = module.pop(f"{dense}.weight")
        module |= {f"{dense}.matrix_A.0": torch.ones(2, 32), f"{dense}.matrix_B.0": torch.ones(64, 2)}
        torch.save({"module": module}, path)
    weights = SatWeights(folder)
    assert fingerprint(folder) == fingerprint(DATA / "hf") and weights.has_lora
    with pytest.raises(UserError, match="merge_lora"):
        weights.lora_parts()


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_factors_are_the_pairs_exactly(alpha: float) -> None:
    weights = SatWeights(DATA / "sat_lora")
    pairs = weights.lora_parts()
    factors = factors_of(pairs, alpha)
    assert len(factors) == 2 * (3 + 2)
    for module, found in pairs.items():
        delta = torch.cat([b.double() @ a.double() for a, b in found]) * (alpha / 4)
        assert torch.equal(factors[module].delta(), delta), module
        assert factors[module].rank == 12 and len(found) == (3 if "query" in module else 1)


def test_factors_become_the_same_pairs_again() -> None:
    weights = SatWeights(DATA / "sat_lora")
    pairs = weights.lora_parts()
    again, rank = pairs_of(factors_of(pairs, 1.0), weights.config)
    assert rank == 4 and again.keys() == pairs.keys()
    for module, found in pairs.items():
        for (a, b), (a_again, b_again) in zip(found, again[module], strict=True):
            assert torch.equal(a, a_again) and torch.equal(b, b_again)


def test_any_factors_on_attention_fit_in_sat() -> None:
    config = SatWeights(DATA / "sat").config
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for rank, module in ((3, "model.layers.1.self_attn.language_expert_query_key_value"),
                         (5, "model.vision.transformer.layers.0.attention.dense")):  # fmt: skip
        n_in = 64 if "layers.1" in module else 48
        n_out = 3 * n_in if "query" in module else n_in
        a, b = torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator)
        factors[module] = Factor(a, b, 0.7)
    pairs, rank = pairs_of(factors, config)
    assert rank == 5 and len(pairs) == 10
    for module, found in pairs.items():
        delta = torch.cat([b.double() @ a.double() for a, b in found]) / rank
        if module in factors:
            assert torch.allclose(delta, factors[module].delta(), rtol=1e-6, atol=1e-6)
        else:
            assert not delta.any()


def test_other_layers_have_no_place_in_a_sat_lora() -> None:
    weights = SatWeights(DATA / "sat_lora")
    factor = next(iter(factors_of(weights.lora_parts(), 1.0).values()))
    with pytest.raises(UserError, match=r"1 adapted layers have no place .*vision_expert_dense; .*--merge"):
        pairs_of({"model.layers.0.self_attn.vision_expert_dense": factor}, weights.config)
