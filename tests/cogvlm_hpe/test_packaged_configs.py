"""Every YAML under configs/ says what it seems to say, and those for the published checkpoints are ready to edit."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cogvlm_hpe import config as configs
from cogvlm_hpe.train.command import main, parse_file

FOLDER = Path(configs.__file__).parent / "configs"
PUBLISHED = [FOLDER / "supervised.yaml", FOLDER / "supervised-sat.yaml"]


def assert_kept(written: Any, printed: Any, key: str) -> None:
    """What the file says stands in what was printed; lists and values are equal."""
    if isinstance(written, dict):
        for name, value in written.items():
            assert_kept(value, printed[name], f"{key}.{name}")
    elif isinstance(written, list) and written and isinstance(written[0], dict):
        assert len(written) == len(printed), key
        for one, other in zip(written, printed, strict=True):
            assert_kept(one, other, key)
    else:
        assert written == printed, key


@pytest.mark.parametrize(
    "path", sorted({*FOLDER.rglob("*.yaml")} - {FOLDER / "merge.yaml"}), ids=lambda path: path.stem
)
def test_the_programs_own_parser_prints_them_resolved(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(path), "--print_config"])
    assert ended.value.code in (0, None)
    assert_kept(yaml.safe_load(path.read_text()), yaml.safe_load(capsys.readouterr().out), path.stem)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_those_for_published_checkpoints_fit_one_to_sixteen_gpus(path: Path) -> None:
    config = parse_file(path)
    assert [configs.check_world(config, ranks) for ranks in (1, 2, 4, 8, 16)] == [16, 8, 4, 2, 1]
    assert (config.model.dtype, config.train.zero_stage, config.train.gradient_checkpointing) == ("bf16", 2, True)
    assert config.adapter is not None and config.adapter.scope == "text"
    marked = {line.split(":")[0].strip() for line in path.read_text().splitlines() if "# EDIT" in line}
    assert marked == {"run_dir", "base", "tokenizer", "- {path"}


def test_the_form_of_the_checkpoint_is_their_only_difference() -> None:
    plain, sat = (configs.flatten(parse_file(path)) for path in PUBLISHED)
    assert {key for key in plain if plain[key] != sat[key]} == {"model.base", "run_dir"}
