"""Published folders as they are, and transformers' Auto classes where a folder says its model_type."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from cogvlm_hpe.model import CogVLMConfig, CogVLMForCausalLM, CogVLMProcessor, CogVLMTokenizer
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.tokenizer import FILE_NAME, load_tokenizer, train_tokenizer

DATA = Path(__file__).parents[2] / "data" / "tiny0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The published folder with a model_type, its remote code still named and not there, and a tokenizer."""
    folder = tmp_path / "base"
    shutil.copytree(DATA / "hf", folder)
    path = folder / "config.json"
    value = json.loads(path.read_text())
    assert "auto_map" in value and "model_type" not in value
    path.chmod(0o644)
    path.write_text(json.dumps(value | {"model_type": "cogvlm"}))
    train_tokenizer(["Where is it"]).save(str(folder / FILE_NAME))
    return folder


def assert_original_logits(model: CogVLMForCausalLM) -> None:
    given = torch.load(DATA / "inputs.pt", weights_only=True)["image_text"]
    expected = torch.load(DATA / "logits.pt", weights_only=True)["image_text"]
    with torch.no_grad():
        logits = model.eval()(
            given["input_ids"], given["token_type_ids"], given["attention_mask"], given["images"]
        ).logits
    assert (logits - expected)[given["attention_mask"] == 1].abs().max() < 1e-4


def test_a_published_folder_is_read_unchanged() -> None:
    model, info = CogVLMForCausalLM.from_pretrained(DATA / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.config.hidden_size, model.config.image_tokens, model.config.vocab_size) == (64, 16, 320)
    assert_original_logits(model)


def test_auto_classes_know_the_model_type(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is CogVLMConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder)
        assert type(model) is CogVLMForCausalLM
    assert_original_logits(model)
    assert type(AutoModelForCausalLM.from_config(config)) is CogVLMForCausalLM


def test_auto_classes_know_processor_and_tokenizer(folder: Path) -> None:
    processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(processor) is CogVLMProcessor
    assert type(tokenizer) is type(processor.tokenizer) is CogVLMTokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    text = "  Where is it </s>"
    expected = load_tokenizer(folder).encode(text, add_special_tokens=False).ids
    assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"] == expected


_LATE = """
import sys
import cogvlm_hpe
assert not {"torch", "transformers"} & set(sys.modules), "importing the package must cost nothing"
import cogvlm_hpe.merge.writer, cogvlm_hpe.model.fingerprint, cogvlm_hpe.model.tokenizer
assert "transformers" not in sys.modules, "merging needs no model"
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "CogVLMConfig"
assert "cogvlm_hpe.model.modeling" not in sys.modules
from transformers import AutoProcessor, AutoTokenizer, AutoModelForCausalLM
for auto in (AutoTokenizer, AutoProcessor, AutoModelForCausalLM):
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.slow
def test_the_import_is_light_and_auto_classes_find_the_model_all_the_same(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LATE, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["CogVLMTokenizer", "CogVLMProcessor", "CogVLMForCausalLM"]


def test_what_is_saved_is_known_to_auto_classes(tmp_path: Path) -> None:
    CogVLMForCausalLM.from_pretrained(DATA / "hf").save_pretrained(tmp_path)
    CogVLMProcessor.from_pretrained(resolve_base("tiny")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "cogvlm"
    assert_original_logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(AutoProcessor.from_pretrained(tmp_path)) is CogVLMProcessor
