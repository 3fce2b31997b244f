"""Bases in Hugging Face form: safetensors and .bin, in shards or not, and folders that are not whole."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.weights import drop_pages, open_weights, read_config
from launcher.errors import UserError

HF = Path(__file__).parents[2] / "data" / "tiny0" / "hf"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return load_file(HF / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(HF / "config.json", tmp_path)
    return tmp_path


def shard(folder: Path, tensors: dict[str, torch.Tensor], ending: str) -> None:
    """Write three shards and their index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    where = {name: f"{stem}-{1 + n % 3:05d}-of-00003.{ending}" for n, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        part = {name: tensors[name] for name in where if where[name] == file}
        save_file(part, folder / file) if ending == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors shards"])
def test_every_form_reads_alike(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        shard(folder, tensors, form.split()[0])
    (folder / "optimizer.safetensors").write_bytes(b"not of the model")
    weights = open_weights(folder)
    assert weights.names() == sorted(name for name in tensors if "inv_freq" not in name)
    for name in weights.names():
        assert weights.shape(name) == tuple(tensors[name].shape) and weights.dtype(name) == torch.float32
        assert torch.equal(weights.read(name), tensors[name])
        assert torch.equal(weights.flat(name, 3, 9), tensors[name].reshape(-1)[3:9])
    assert fingerprint(folder) == fingerprint(HF)


def test_the_fingerprint_tells_bases_apart(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    seen = {fingerprint(HF)}
    for number, change in enumerate(("value", "dtype", "name", "config")):
        other, path = dict(tensors), folder / str(number)
        path.mkdir()
        shutil.copy(folder / "config.json", path)
        if change == "value":
            other["lm_head.weight"] = tensors["lm_head.weight"].clone()
            other["lm_head.weight"][-1, -1] += 1
        elif change == "dtype":
            other["lm_head.weight"] = tensors["lm_head.weight"].half()
        elif change == "name":
            other["head.weight"] = other.pop("lm_head.weight")
        else:
            text = (path / "config.json").read_text()
            (path / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
        save_file(other, path / "model.safetensors")
        seen.add(fingerprint(path))
    assert len(seen) == 5


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_missing_shard_is_named(folder: Path, tensors: dict[str, torch.Tensor], ending: str) -> None:
    shard(folder, tensors, ending)
    [second] = folder.glob(f"*-00002-*.{ending}")
    second.unlink()
    with pytest.raises(UserError, match=rf"{second.name} of .*index\.json is missing; copy it there"):
        open_weights(folder)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_is_named(
    folder: Path, tensors: dict[str, torch.Tensor], ending: str, share: float
) -> None:
    shard(folder, tensors, ending)
    [second] = folder.glob(f"*-00002-*.{ending}")
    whole = second.read_bytes()
    second.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=rf"{second.name}: not a whole .*; copy it again") as error:
        open_weights(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no base model there; name a folder with config.json or SAT's model_config.json"),
        ({"config.json": "{}"}, r"no weights there \(model\*\.safetensors or pytorch_model\*\.bin\)"),
        ({"config.json": "{"}, "config.json: not readable JSON"),
        ({"config.json": "[]"}, "config.json: not a JSON object"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "has no weight_map"),
        ({"model_config.json": "{}"}, "no eva_args, so it is no CogVLM"),
    ],
)
def test_a_folder_without_a_base_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=message):
            open_weights(tmp_path)


def test_a_bin_that_is_no_state_dict_is_refused(folder: Path) -> None:
    torch.save({"module": {"w": torch.zeros(1)}}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="entry 'module' of its state dict is no tensor"):
        open_weights(folder)
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no state dict"):
        open_weights(folder)


def test_a_published_config_without_eps_is_warned_of(folder: Path) -> None:
    value = json.loads((folder / "config.json").read_text())
    del value["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(value))
    with pytest.warns(UserWarning, match="no rms_norm_eps; took 1e-05"):
        assert read_config(folder).rms_norm_eps == 1e-5
    (folder / "config.json").write_text(json.dumps(value | {"model_type": "cogvlm"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config(folder).rms_norm_eps == 1e-5


def resident_pages(tensor: torch.Tensor) -> int:
    """kB of the mapping under `tensor` that are in memory."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            start, stop = (int(side, 16) for side in line.split(" ")[0].split("-"))
            inside = start <= tensor.data_ptr() < stop
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_what_is_forgotten_is_no_longer_in_memory(folder: Path, ending: str) -> None:
    tensors = {"w": torch.ones(1000, 1000)}
    if ending == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    weights = open_weights(folder)
    view = weights.read("w")
    assert view.sum() == 1e6 and resident_pages(view) > 3800
    weights.forget("w")
    assert resident_pages(view) < 200 and view.sum() == 1e6


def test_memory_that_is_no_files_is_left_alone() -> None:
    tensor = torch.ones(1000, 1000)
    drop_pages(tensor)
    assert tensor.sum() == 1e6
