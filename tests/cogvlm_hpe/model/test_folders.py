"""What lies in a folder: bases, adapters and what they say of themselves."""

import json
from pathlib import Path

import pytest

from cogvlm_hpe.model.folders import base_of, is_adapter, read_notes, resolve_base, tokenizer_folder
from launcher.errors import UserError

TINY = resolve_base("tiny")


def test_a_folder_without_a_config_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json or model_config\.json.*or one of tiny"):
        resolve_base(tmp_path)
    (tmp_path / "model_config.json").write_text("{}")
    assert resolve_base(tmp_path) == tmp_path


def test_an_adapters_tokenizer_wins_while_it_exists(tmp_path: Path) -> None:
    assert tokenizer_folder(tmp_path, {"tokenizer": str(TINY)}) == TINY
    assert tokenizer_folder(tmp_path, {"tokenizer": str(tmp_path / "gone")}) == tmp_path
    assert tokenizer_folder(tmp_path, {"tokenizer": None}) == tmp_path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"base_model_name_or_path": "tiny"}', None),
        ('{"base_model_name_or_path": "gone"}', "gone: no base model there"),
        ("{}", "names no base"),
        ("{", "not readable JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_an_adapter_names_its_base(tmp_path: Path, text: str, said: str | None) -> None:
    assert not is_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert is_adapter(tmp_path)
    if said is None:
        assert base_of(tmp_path) == TINY
    else:
        with pytest.raises(UserError, match=said):
            base_of(tmp_path)


def test_notes_stand_over_those_of_a_bare_base(tmp_path: Path) -> None:
    bare = read_notes(tmp_path)
    assert (bare["scope"], bare["answer_format"]) == ("all", "offset") and "{box}" in bare["prompts"]["pose"]
    (tmp_path / "hpe.json").write_text(json.dumps({"scope": "text", "stage": "weak"}))
    assert read_notes(tmp_path) == bare | {"scope": "text", "stage": "weak"}
    (tmp_path / "hpe.json").write_text(json.dumps({"prompts": {"pose": "Pose of {box}?"}}))
    assert read_notes(tmp_path)["prompts"] == bare["prompts"] | {"pose": "Pose of {box}?"}
    (tmp_path / "hpe.json").write_text("{")
    with pytest.raises(UserError, match=r"hpe\.json: not readable JSON"):
        read_notes(tmp_path)
