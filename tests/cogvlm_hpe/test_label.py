"""Weak labels: which heads get them, what is said of them, and a real network behind the command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_tiny_model

from cogvlm_hpe import cli
from cogvlm_hpe.evaluate.baselines.cnn import CNNConfig, PoseCNN, save_cnn
from cogvlm_hpe.label import Labelled
from launcher.comm import single
from shards import pose
from shards.index import open_set
from shards.verify import verify


def fixed(pixels: np.ndarray, boxes: list) -> list:
    """The first head gets yaw 30 with confidence 0.4, the second no answer, the others yaw 60 for certain."""
    first = (pose.rotation_from_pose(30.0, 0.0, 0.0), 0.4)
    other = (pose.rotation_from_pose(60.0, 0.0, 0.0), 1.0)
    return [first if n == 0 else None if n == 1 else other for n in range(len(boxes))]


def unlabelled(shard_set, heads: int = 3):
    known = shard_set.record(0)
    return replace(known, heads=[replace(known.heads[0], rotation=None)] * heads)


def test_heads_without_a_pose_get_the_answer_and_its_confidence(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=4))
    found = Labelled(shard_set, fixed, "x").labelled(unlabelled(shard_set), np.zeros((8, 8, 3), np.uint8)).heads
    assert [head.weak for head in found] == [True, False, True]
    assert [head.confidence for head in found] == [0.4, 1.0, 1.0]
    assert found[0].pose_deg == pytest.approx([30.0, 0.0, 0.0])
    assert found[1].rotation is None


def test_poses_of_too_little_confidence_are_left_out(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=4))
    labelled = Labelled(shard_set, fixed, "x", min_confidence=0.5)
    found = labelled.labelled(unlabelled(shard_set), np.zeros((8, 8, 3), np.uint8)).heads
    assert [head.rotation is None for head in found] == [True, True, False]


def test_known_poses_stay_unless_asked(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=4))
    known, pixels = shard_set.record(0), np.zeros((8, 8, 3), np.uint8)
    assert Labelled(shard_set, fixed, "x").labelled(known, pixels) == known
    again = Labelled(shard_set, fixed, "x", relabel=True).labelled(known, pixels)
    assert again.heads[0].weak and again.heads[0].pose_deg[0] == pytest.approx(30.0)


def test_relabelled_heads_without_a_good_answer_keep_no_true_label(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=4))
    record = shard_set.record(0)
    known = replace(record, heads=[record.heads[0]] * 3)
    again = Labelled(shard_set, fixed, "x", relabel=True, min_confidence=0.5)
    found = again.labelled(known, np.zeros((8, 8, 3), np.uint8)).heads
    assert [head.rotation is None for head in found] == [True, True, False]
    assert [head.weak for head in found] == [False, False, True]


def test_a_labelled_set_is_sound_and_says_by_what(tmp_path: Path, tiny_set: Callable[..., Path]) -> None:
    save_cnn(tmp_path / "cnn", PoseCNN(CNNConfig("resnet", (8,), (1,), 16, 0.1)).eval(), {})
    words = ["label", str(tiny_set(samples=5)), "--relabel", "--with", f"cnn:{tmp_path / 'cnn'}"]
    assert cli.main([*words, "--out", str(tmp_path / "weak")]) == 0
    made = open_set(tmp_path / "weak")
    heads = [head for i in range(len(made)) for head in made.record(i).heads]
    assert all(head.weak and 0.0 <= head.confidence <= 1.0 for head in heads)
    assert made.info["scope"]["labelled_with"].startswith("cnn:")
    assert verify([tmp_path / "weak"], single()) == []
    before = json.loads((tmp_path / "weak" / "index.json").read_text())
    assert cli.main([*words, "--out", str(tmp_path / "again")]) == 0
    after = json.loads((tmp_path / "again" / "index.json").read_text())
    assert [s["sha256"] for s in before["shards"]] == [s["sha256"] for s in after["shards"]]


@pytest.mark.slow
def test_a_language_model_labels_too(tmp_path: Path, tiny_set: Callable[..., Path]) -> None:
    shard_set = tiny_set(samples=8)
    model = write_tiny_model(tmp_path / "base", shard_set, steps=200)
    words = ["label", str(shard_set), "--relabel", "--with", f"cogvlm:{model}", "--out", str(tmp_path / "weak")]
    assert cli.main(words) == 0
    truth, weak = open_set(shard_set), open_set(tmp_path / "weak")
    gaps = [
        pose.geodesic_deg(a.matrix, b.matrix)
        for i in range(len(weak))
        for a, b in zip(truth.record(i).heads, weak.record(i).heads, strict=True)
        if b.weak
    ]
    assert gaps and np.median(gaps) < 20.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--with", "tree:x"], "must be cnn:DIR or cogvlm:DIR"),
        (["--with", "cnn:x", "--min-confidence", "2"], "must lie in 0..1"),
        (["--with", "cnn:x", "--dtype", "bf16"], "--dtype bf16: is of cogvlm:DIR"),
    ],
)
def test_usage_errors(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["label", str(tmp_path), *words, "--out", str(tmp_path / "o")]) == 2
    assert said in capsys.readouterr().err
