"""Bases from disk to their place: every tensor matched, nothing copied that need not be."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import small_model
from tiny_model import small_config

from cogvlm_hpe.cli import main
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.convert import Source, write_sat
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.load import empty_model, load, load_base, load_several
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.tokenizer import FILE_NAME, train_tokenizer
from cogvlm_hpe.model.weights import open_weights
from launcher.errors import UserError

TINY = resolve_base("tiny")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small random base in bf16."""
    torch.manual_seed(0)
    CogVLMForCausalLM(small_config()).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def mapped(path: Path) -> list[range]:
    """Addresses at which a file is mapped into this process."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path.resolve()))]
    return [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]


def change(base: Path, *, drop: str = "$.", rename: tuple[str, str] = ("$.", ""), cut: str = "$.") -> Path:
    """A copy of `base` without tensors, with other names, or with one row less where the patterns match."""
    out = shutil.copytree(base, base.with_name("changed"))
    tensors = load_file(base / "model.safetensors")
    tensors = {re.sub(*rename, name): t for name, t in tensors.items() if not re.search(drop, name)}
    tensors = {name: t[:-1].contiguous() if re.search(cut, name) else t for name, t in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_from_pretrained(base: Path, dtype: torch.dtype) -> None:
    ours, theirs = load_base(base, dtype), CogVLMForCausalLM.from_pretrained(base, dtype=dtype)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == dtype and tensor.equal(expected[name]), name
    assert not ours.training and ours.config.dtype == dtype
    assert ours.config.to_dict() == theirs.config.to_dict()


def test_frozen_weights_are_the_mapped_file_itself(base: Path) -> None:
    model = load_base(base, torch.bfloat16)
    places = mapped(base / "model.safetensors")
    assert all(any(p.data_ptr() in place for place in places) for p in model.parameters())


@pytest.mark.parametrize(("form", "is_mapped"), [("bin", True), ("sat 1", True), ("sat 2", False)])
def test_every_form_of_a_base_loads_alike(tmp_path: Path, form: str, is_mapped: bool) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "base")
    out = tmp_path / "other"
    if form == "bin":
        out.mkdir()
        shutil.copy(tmp_path / "base" / "config.json", out)
        torch.save(model.state_dict(), out / "pytorch_model.bin")
    else:
        write_sat(Source(open_weights(tmp_path / "base")), out, int(form[-1]))
    loaded = load_base(resolve_base(out))
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).equal(parameter), name
    places = [place for path in out.rglob("*") for place in mapped(path)]
    assert all(any(p.data_ptr() in place for place in places) for p in loaded.parameters()) == is_mapped


@pytest.mark.parametrize("options", [{"own": True, "dtype": torch.bfloat16}, {"dtype": torch.float32}])
def test_weights_to_be_trained_or_converted_have_their_own_memory(base: Path, options: dict) -> None:
    model = load_base(base, **options)
    places = mapped(base / "model.safetensors")
    assert not any(p.data_ptr() in place for place in places for p in model.parameters())


def test_nothing_writes_into_the_file(base: Path) -> None:
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).digest()
    model = load_base(base, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).digest() == before
    assert not load_base(base, torch.bfloat16).lm_head.weight.eq(7.0).any()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"drop": r"language_mlp\.up_proj"}, [r"missing model\.layers\.\*\.mlp\.language_mlp\.up_proj\.weight ×2"]),
        (
            {"rename": (r"vision_expert_dense", "vision_dense")},
            [
                r"missing model\.layers\.\*\.self_attn\.vision_expert_dense\.weight ×2",
                r"unexpected model\.layers\.\*\.self_attn\.vision_dense\.weight ×2",
            ],
        ),
        ({"cut": r"lm_head"}, [r"of another shape lm_head\.weight \(40×32, not 41×32\)"]),
        ({"drop": r"vision"}, [r"missing .*, \d+ more kinds"]),
    ],
)
def test_wrong_tensors_are_grouped_in_one_line_before_any_is_read(
    base: Path, monkeypatch: pytest.MonkeyPatch, changed: dict, said: list[str]
) -> None:
    folder = change(base, **changed)
    weights = open_weights(folder)
    monkeypatch.setattr(type(weights), "read", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(UserError) as caught:
        load_base(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message and len(message) < 600
    for pattern in said:
        assert re.search(pattern, message), message


def test_config_of_another_model_is_refused(base: Path) -> None:
    value = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(value | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"missing .*model\.layers\.\*\.input_layernorm\.weight"):
        load_base(base)


def test_truncated_file_is_named(base: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_base(base)


def test_a_sat_lora_that_is_left_out_is_told(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "data" / "tiny0" / "sat_lora"
    train_tokenizer(["Where is it"]).save(str(tmp_path / FILE_NAME))
    with pytest.warns(UserWarning, match=r"sat_lora: its unmerged LoRA is left out.*--to hf --only-adapter"):
        load(folder, tokenizer=tmp_path)
    assert main(["convert", str(folder), str(tmp_path / "adapter"), "--to", "hf", "--only-adapter"]) == 0
    with warnings.catch_warnings(record=True) as said:
        load(tmp_path / "adapter", tokenizer=tmp_path)
    assert not [warning for warning in said if "unmerged" in str(warning.message)], "with the adapter nothing is lost"


def test_tokenizer_may_lie_elsewhere(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load(tmp_path)
    assert load(tmp_path, tokenizer=TINY).tokenizer.get_vocab_size() == load(TINY).tokenizer.get_vocab_size()


def test_a_base_judged_beside_adapters_speaks_with_their_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path / "base")
    for adapter, notes in (("old", {"tokenizer": "gone"}), ("new", {"tokenizer": str(TINY)})):
        (tmp_path / adapter).mkdir()
        (tmp_path / adapter / "hpe.json").write_text(json.dumps(notes))
    monkeypatch.setattr("cogvlm_hpe.model.load.put_adapter", lambda *_: None)
    base, tuned = load_several(tmp_path / "base", [None, tmp_path / "new"])
    assert base.tokenizer.to_str() == tuned.tokenizer.to_str()
    with pytest.raises(UserError, match="tokenizer"):
        load_several(tmp_path / "base", [None, tmp_path / "old"])


def test_a_base_judged_beside_adapters_is_asked_in_their_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for adapter, words in (("one", "Box of {expression}?"), ("same", "Box of {expression}?"), ("other", "Find it!")):
        (tmp_path / adapter).mkdir()
        (tmp_path / adapter / "hpe.json").write_text(json.dumps({"prompts": {"where": words}}))
    monkeypatch.setattr("cogvlm_hpe.model.load.put_adapter", lambda *_: None)
    base, tuned, _ = load_several(TINY, [None, tmp_path / "one", tmp_path / "same"])
    assert base.notes["prompts"] == tuned.notes["prompts"] and base.notes["prompts"]["where"] == "Box of {expression}?"
    load_several(TINY, [tmp_path / "one", tmp_path / "other"])
    with pytest.raises(UserError, match=r"one and .*other: are asked in different words .* in two runs"):
        load_several(TINY, [None, tmp_path / "one", tmp_path / "other"])


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match="tokens, but the model's vocab_size is 41"):
        load(base, tokenizer=TINY)


@pytest.mark.parametrize(("side_px", "parameters"), [(490, 17_639_685_376), (224, 17_637_948_928)])
def test_the_published_model_has_its_published_size(side_px: int, parameters: int) -> None:
    vision = {"image_size": side_px, "num_positions": (side_px // 14) ** 2 + 1}
    model = empty_model(CogVLMConfig(vision_config=vision), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
