"""CrowdHuman: boxes clipped to the image, everything else dropped by its own reason, no angles anywhere."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from launcher.errors import UsageError, UserError
from shards.cli import main
from shards.index import open_set
from shards.record import Head
from shards.sources import SOURCES
from shards.sources.crowdhuman import CrowdHuman
from shards.sources.fixtures import build_words
from shards.sources.fixtures import crowdhuman as fixture


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "CrowdHuman"
    fixture.write(folder)
    return folder


def test_heads_are_boxes_without_a_rotation(tree: Path) -> None:
    sample = CrowdHuman(tree).sample(0)
    assert sample.record.heads == [
        Head((10.0, 8.0, 30.0, 34.0), None),
        Head((60.0, 12.0, 78.0, 34.0), None, visible=0.5),
        Head((112.0, 40.0, 128.0, 70.0), None),
    ]
    assert sample.record.image.id == "273271,c9db000d5146c15" and sample.key.startswith("273271_c9db000d5146c15-")
    assert sample.image == (tree / "Images" / "273271,c9db000d5146c15.jpg").read_bytes()


def test_what_is_dropped_is_counted_by_reason(tree: Path) -> None:
    train, val = CrowdHuman(tree), CrowdHuman(tree, "val")
    assert len(train) == 2 and len(val) == 1
    assert train.scope["dropped"] == {
        "ignored head": 1,
        "ignored person": 1,
        "less than 8 px of the head in the image": 2,
        "no head box": 1,
        "not a person (mask)": 1,
        "unsure head": 1,
    }
    assert val.scope["dropped"] == {"image without heads": 1, "not a person (mask)": 1}
    assert len(CrowdHuman(tree, least_px=4).sample(0).record.heads) == 5


def test_missing_and_broken_files_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"annotation_train\.odgt: not there; CrowdHuman's annotations"):
        CrowdHuman(tmp_path)
    with pytest.raises(UsageError, match="--least-px 0"):
        CrowdHuman(tree, least_px=0)
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    labels, whole = copy / "annotation_train.odgt", (copy / "annotation_train.odgt").read_text()
    first = json.loads(whole.splitlines()[0])
    for line, said in (
        ("[1]", "no ID of an image"),
        ('{"ID": "../secret", "gtboxes": []}', "no ID of an image"),
        ('{"ID": "273271,c9db000d5146c15"}', "list of gtboxes"),
        (json.dumps(first | {"gtboxes": [{"tag": "person", "hbox": [1, 2, 3]}]}), "not CrowdHuman's format"),
        (json.dumps(first | {"gtboxes": [{"hbox": [1, 2, 3, 4]}]}), r"not CrowdHuman's format \(KeyError: 'tag'\)"),
        (json.dumps(first | {"gtboxes": ["person"]}), "not CrowdHuman's format"),
    ):
        labels.write_text(f"{whole}{line}\n")
        with pytest.raises(UserError, match=rf"annotation_train\.odgt, line 3: .*{said}"):
            CrowdHuman(copy)
    labels.write_text(whole)
    (copy / "Images" / "273278,3ae7c000cd1ca3f5.jpg").unlink()
    with pytest.raises(UserError, match=r"273278,3ae7c000cd1ca3f5\.jpg: not there"):
        CrowdHuman(copy)


def test_a_built_set_verifies_and_counts_no_poses(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "set"
    assert main([*build_words("crowdhuman", tree), "--out", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert "good" in capsys.readouterr().out
    built = open_set(out)
    assert built.info["counts"]["heads"] == 4 and sum(built.info["poses"]["yaw"]["heads"]) == 0
    assert main(["preview", str(out), "--out", str(tmp_path / "sheet.png")]) == 0


def test_options_reach_the_source(tree: Path) -> None:
    add_arguments, make = SOURCES["crowdhuman"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    source = make(parser.parse_args([str(tree), "--split", "val", "--least-px", "4"]))
    assert source.split == "val" and source.scope["least_px"] == 4
