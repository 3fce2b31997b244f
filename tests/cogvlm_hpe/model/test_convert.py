"""`cogvlm-hpe convert`: what goes through it comes out the same, in a folder that is whole or not there."""

import errno
import json
import math
import re
import shutil
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvlm_hpe.cli import main
from cogvlm_hpe.model import convert
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.folders import base_of, read_notes
from cogvlm_hpe.model.load import load_base, put_adapter
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.weights import AnyWeights, open_weights

DATA = Path(__file__).parents[2] / "data" / "tiny0"
MODULE = "1/mp_rank_00_model_states.pt"


def run(*words: str | Path) -> int:
    return main(["convert", *map(str, words)])


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line with which these words are refused."""
    capsys.readouterr()
    assert run(*words) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def module_of(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"1/mp_rank_{rank:02d}_model_states.pt", weights_only=True)["module"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@cache
def oracle(name: str) -> dict:
    return torch.load(DATA / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("form", ["sat", "sat_mp2", "hf"])
def test_sat_becomes_the_published_files(tmp_path: Path, form: str) -> None:
    assert run(DATA / form, tmp_path / "out", "--to", "hf") == 0
    assert same(load_file(tmp_path / "out/model.safetensors"), load_file(DATA / "hf/model.safetensors"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "cogvlm" and config["architectures"] == ["CogVLMForCausalLM"]
    wanted = json.loads((DATA / "hf/config.json").read_text())
    differing = {key for key in wanted if config.get(key) != wanted[key]}
    assert differing <= {"auto_map", "transformers_version", "max_position_embeddings", "template_version"}
    assert fingerprint(tmp_path / "out") == fingerprint(DATA / "hf")


@pytest.mark.parametrize("form", ["hf", "sat_mp2"])
def test_hf_becomes_the_original_sat_files(tmp_path: Path, form: str) -> None:
    assert run(DATA / form, tmp_path / "out", "--to", "sat") == 0
    assert same(module_of(tmp_path / "out"), module_of(DATA / "sat"))
    assert (tmp_path / "out/latest").read_text() == "1"


def test_it_splits_as_sat_does(tmp_path: Path) -> None:
    assert run(DATA / "hf", tmp_path / "out", "--to", "sat", "--mp", "2") == 0
    assert all(same(module_of(tmp_path / "out", rank), module_of(DATA / "sat_mp2", rank)) for rank in (0, 1))
    assert json.loads((tmp_path / "out/model_config.json").read_text())["eva_args"]["model_parallel_size"] == 2


def test_shards_have_an_index(tmp_path: Path) -> None:
    assert run(DATA / "sat", tmp_path / "out", "--to", "hf", "--max-shard-gb", "0.0005") == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(files) == 4 and sorted(set(index["weight_map"].values())) == files
    assert max((tmp_path / "out" / name).stat().st_size for name in files) < 520_000
    assert fingerprint(tmp_path / "out") == fingerprint(DATA / "sat")
    assert torch.equal(load_base(tmp_path / "out").lm_head.weight, open_weights(DATA / "hf").read("lm_head.weight"))


def test_half_precision_stays(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in load_file(DATA / "hf/model.safetensors").items()}
    (tmp_path / "half").mkdir()
    save_file(tensors, tmp_path / "half/model.safetensors")
    shutil.copy(DATA / "hf/config.json", tmp_path / "half")
    run(tmp_path / "half", tmp_path / "sat", "--to", "sat")
    run(tmp_path / "sat", tmp_path / "back", "--to", "hf")
    assert same(load_file(tmp_path / "back/model.safetensors"), tensors)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_companions_come_along(tmp_path: Path) -> None:
    source = Path(shutil.copytree(DATA / "sat", tmp_path / "sat"))
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "notes.txt").write_text("not needed")
    run(source, tmp_path / "out", "--to", "hf")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.model"}


def lora_logits(model: torch.nn.Module, case: str) -> float:
    """Largest difference from what SAT computes with its LoRA."""
    given, wanted = oracle("inputs")[case], oracle("extras")["lora"]["logits"][case]
    with torch.no_grad():
        found = model(given["input_ids"], given["token_type_ids"], given["attention_mask"], given["images"]).logits
    return float((found - wanted)[given["attention_mask"] == 1].abs().max())


def test_a_sat_lora_becomes_a_base_and_an_adapter_that_plain_peft_loads(tmp_path: Path) -> None:
    assert run(DATA / "sat_lora", tmp_path / "out", "--to", "hf") == 0
    assert fingerprint(tmp_path / "out") == fingerprint(DATA / "hf")
    adapter = tmp_path / "out/adapter"
    hpe = json.loads((adapter / "hpe.json").read_text())
    assert hpe["scope"] == "all" and hpe["base_fingerprint"] == fingerprint(DATA / "hf")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 3) and config["base_model_name_or_path"] == str(tmp_path / "out")
    assert not config["rank_pattern"] and len(config["target_modules"]) == 10
    tuned = peft.PeftModel.from_pretrained(load_base(tmp_path / "out"), adapter).eval().base_model.model
    for case in oracle("extras")["lora"]["logits"]:
        assert lora_logits(tuned, case) < 1e-4


def test_an_adapter_alone_keeps_its_sat_base(tmp_path: Path) -> None:
    assert run(DATA / "sat_lora", tmp_path / "out", "--to", "hf", "--only-adapter") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "hpe.json"}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(DATA / "sat_lora")
    base = base_of(tmp_path / "out")
    model = load_base(base)
    put_adapter(model, tmp_path / "out", base, read_notes(tmp_path / "out"))
    assert lora_logits(model, "image_text") < 1e-4


def test_alpha_scales_the_adapter(tmp_path: Path) -> None:
    run(DATA / "sat_lora", tmp_path / "out", "--to", "hf", "--only-adapter", "--lora-alpha", "6")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_alpha"] == 18


def test_a_merged_lora_is_a_base(tmp_path: Path) -> None:
    run(DATA / "sat_lora", tmp_path / "hf", "--to", "hf", "--merge")
    run(DATA / "sat_lora", tmp_path / "sat", "--to", "sat", "--merge", "--mp", "2")
    assert fingerprint(tmp_path / "hf") == fingerprint(tmp_path / "sat")
    assert not (tmp_path / "hf/adapter").exists()
    here, there = open_weights(tmp_path / "sat"), open_weights(DATA / "sat_lora_merged")
    assert max(float((here.read(name) - there.read(name)).abs().max()) for name in there.names()) < 1e-6


def test_the_loss_of_rounding_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = {name: t if "matrix" in name else t.bfloat16() for name, t in module_of(DATA / "sat_lora").items()}
    shutil.copytree(DATA / "sat_lora", tmp_path / "sat")
    torch.save({"module": module}, tmp_path / "sat" / MODULE)
    run(tmp_path / "sat", tmp_path / "out", "--to", "hf", "--merge")
    line = capsys.readouterr().out.splitlines()[0]
    assert "rounding to the base's dtype changed the LoRA's part by" in line
    typical, worst = (float(word) for word in re.findall(r"([\d.]+)%", line))
    assert 0.1 < typical <= worst < 20


def test_an_adapter_goes_back_to_sat(tmp_path: Path) -> None:
    run(DATA / "sat_lora", tmp_path / "hf", "--to", "hf")
    assert run(tmp_path / "hf/adapter", tmp_path / "sat", "--to", "sat") == 0
    assert same(module_of(tmp_path / "sat"), module_of(DATA / "sat_lora"))
    config = json.loads((tmp_path / "sat/model_config.json").read_text())
    assert config["use_lora"] and config["lora_rank"] == 4
    assert run(tmp_path / "hf/adapter", tmp_path / "merged", "--to", "sat", "--merge", "--base", DATA / "hf") == 0
    run(DATA / "sat_lora", tmp_path / "wanted", "--to", "sat", "--merge")
    assert same(module_of(tmp_path / "merged"), module_of(tmp_path / "wanted"))


def test_how_an_adapter_is_spoken_to_goes_with_it(tmp_path: Path) -> None:
    run(DATA / "sat_lora", tmp_path / "lora", "--to", "hf")
    adapter, prompts = tmp_path / "lora/adapter", {"pose": "Pose of {box}?"}
    notes = json.loads((adapter / "hpe.json").read_text())
    own = notes | {"answer_format": "signed", "prompts": prompts}
    (adapter / "hpe.json").write_text(json.dumps(own))
    for words in (("--to", "hf", "--merge"), ("--to", "sat", "--merge"), ("--to", "sat")):
        out = tmp_path / "-".join(words)
        assert run(adapter, out, *words) == 0
        found = read_notes(out)
        assert (found["answer_format"], found["prompts"]["pose"], found["scope"]) == ("signed", prompts["pose"], "all")
        assert "base_fingerprint" not in found
    unmerged = tmp_path / "--to-sat"
    run(unmerged, tmp_path / "only", "--to", "hf", "--only-adapter")
    run(unmerged, tmp_path / "both", "--to", "hf")
    for folder in (tmp_path / "only", tmp_path / "both/adapter"):
        again = json.loads((folder / "hpe.json").read_text())
        assert (again["answer_format"], again["prompts"]) == ("signed", prompts)
        assert again["base_fingerprint"] == own["base_fingerprint"]


def test_what_contradicts_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, lora = tmp_path / "out", DATA / "sat_lora"
    assert "--mp belongs to --to sat" in said(capsys, DATA / "sat", out, "--to", "hf", "--mp", "2")
    assert "--mp 3: does not divide this model's 4 attention heads" in said(
        capsys, DATA / "hf", out, "--to", "sat", "--mp", "3"
    )
    assert "SAT splits none; add --merge" in said(capsys, lora, out, "--to", "sat", "--mp", "2")
    assert "there is no LoRA in" in said(capsys, DATA / "sat", out, "--to", "hf", "--merge")
    assert "--base belongs to a peft adapter" in said(capsys, DATA / "sat", out, "--to", "hf", "--base", DATA / "hf")
    assert "exclude each other" in said(capsys, lora, out, "--to", "hf", "--merge", "--only-adapter")
    assert "--only-adapter belongs to --to hf" in said(capsys, lora, out, "--to", "sat", "--only-adapter")
    assert "must be above 0" in said(capsys, lora, out, "--to", "hf", "--max-shard-gb", "0")
    assert not out.exists()


def test_adapters_that_cannot_go_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(DATA / "sat_lora", tmp_path / "hf", "--to", "hf")
    adapter, out = tmp_path / "hf/adapter", tmp_path / "out"
    assert "is a Hugging Face (peft) adapter already" in said(capsys, adapter, out, "--to", "hf")
    assert "was trained on another base" in said(
        capsys, adapter, out, "--to", "sat", "--base", DATA / "sat_lora_merged"
    )
    notes = json.loads((adapter / "hpe.json").read_text())
    (adapter / "hpe.json").write_text(json.dumps(notes | {"scope": "text"}))
    assert "an adapter of scope text" in said(capsys, adapter, out, "--to", "sat", "--merge")
    assert not out.exists()


def test_weights_that_are_not_the_configurations_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(DATA / "hf/model.safetensors")
    for layer in range(3):
        del tensors[f"model.layers.{layer}.mlp.vision_mlp.up_proj.weight"]
    tensors |= {"model.extra.weight": torch.zeros(1), "model.norm.weight": torch.zeros(7)}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in/model.safetensors")
    shutil.copy(DATA / "hf/config.json", tmp_path / "in")
    line = said(capsys, tmp_path / "in", tmp_path / "out", "--to", "sat")
    assert (
        "missing model.layers.*.mlp.vision_mlp.up_proj.weight ×3; unexpected model.extra.weight; "
        "of another shape model.norm.weight (7, not 64)" in line
    )


def test_a_folder_is_not_overwritten_and_a_full_disk_is_foreseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    assert "exists already and is not overwritten" in said(capsys, DATA / "hf", tmp_path / "out", "--to", "sat")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "needs 0.0 GB" in said(capsys, DATA / "hf", tmp_path / "new", "--to", "sat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_nothing_is_left_of_a_conversion_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(path: Path, *_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "save_entries", half)
    line = said(capsys, DATA / "hf", tmp_path / "out", "--to", "sat")
    assert "out: cannot be written (No space left on device); nothing is left of it" in line
    assert not list(tmp_path.iterdir())


class _Lazy(AnyWeights):
    """A base of some hundred MB that is made up as it is read."""

    def __init__(self, config: CogVLMConfig) -> None:
        self.folder, self.architecture = Path("nowhere"), config
        with torch.device("meta"):
            model = CogVLMForCausalLM(config)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str) -> torch.Tensor:
        return torch.full(self._shapes[name], 0.01, dtype=torch.bfloat16)

    def forget(self, name: str) -> None:
        pass


def peak_mb(*words: str | Path) -> float:
    """How much resident memory a conversion takes at its highest, above what this process holds before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_kb("VmRSS")
    assert run(*words) == 0
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@pytest.mark.slow
def test_memory_is_bounded_by_a_tensor_and_a_shard(tmp_path: Path) -> None:
    vision = {"hidden_size": 256, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 512}
    config = CogVLMConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        vision_config=vision,
    )  # fmt: skip
    base, slack_mb = _Lazy(config), 40
    convert.write_hf(convert.Source(base), tmp_path / "hf", 20_000_000, 1.0)
    whole_mb, largest_mb, shard_mb = 2 * sum(map(math.prod, base._shapes.values())) / 2**20, 8000 * 768 * 2 / 2**20, 20
    assert whole_mb > 4 * (2 * largest_mb + shard_mb + slack_mb)
    assert peak_mb(tmp_path / "hf", tmp_path / "sat", "--to", "sat") < largest_mb + slack_mb
    assert peak_mb(tmp_path / "hf", tmp_path / "mp2", "--to", "sat", "--mp", "2") < 2 * largest_mb + slack_mb
    shards = ("--to", "hf", "--max-shard-gb", "0.02")
    assert peak_mb(tmp_path / "sat", tmp_path / "back", *shards) < largest_mb + shard_mb + slack_mb
    assert peak_mb(tmp_path / "mp2", tmp_path / "back2", *shards) < 2 * largest_mb + shard_mb + slack_mb
    assert fingerprint(tmp_path / "back2") == fingerprint(tmp_path / "hf")
