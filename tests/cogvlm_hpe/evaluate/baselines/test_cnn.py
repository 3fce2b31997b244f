"""The crop network: its crops, its rotations, and a training that the judge can read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Ranks
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_hpe import cli
from cogvlm_hpe.evaluate.baselines.cnn import CNNConfig, PoseCNN, geodesic_loss, load_cnn, rotation_from_6d, save_cnn
from cogvlm_hpe.evaluate.baselines.crops import head_crops
from launcher.errors import UserError
from shards import pose

SMALL = ["--widths", "16,32,64", "--depths", "1,1,1", "--crop-px", "32"]


@given(st.tuples(*[st.floats(-3, 3)] * 6))
def test_six_numbers_are_the_rotation_that_the_reference_gives(numbers: tuple[float, ...]) -> None:
    columns = np.array(numbers)
    if np.linalg.norm(np.cross(columns[:3], columns[3:])) < 1e-2:
        return  # parallel columns span no plane
    found = rotation_from_6d(torch.tensor(columns)).numpy()
    np.testing.assert_allclose(found, pose.from_6d(columns), atol=1e-6)
    assert pose.is_rotation(found)


def test_loss_is_the_geodesic_angle() -> None:
    a, b = (torch.tensor(pose.rotation_from_pose(*angles)) for angles in ((10.0, 20.0, -30.0), (50.0, -5.0, 100.0)))
    assert float(geodesic_loss(a, b)) == pytest.approx(np.radians(pose.geodesic_deg(a.numpy(), b.numpy())), abs=1e-6)


@pytest.mark.parametrize("angle_deg", [0.0, 180.0])
def test_loss_has_a_finite_gradient_at_both_ends(angle_deg: float) -> None:
    a = torch.eye(3, requires_grad=True)
    geodesic_loss(a, torch.tensor(pose.rotation_from_pose(angle_deg, 0.0, 0.0)).float()).backward()
    assert torch.isfinite(a.grad).all()


def test_crops_are_square_centred_and_go_beyond_the_image() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:30] = (255, 0, 0)
    [crop, corner] = head_crops(pixels, [(20, 10, 30, 30), (50, 30, 60, 40)], 40, 0.0)
    red = crop[0] > 127
    assert red[:, 10:30].all() and not red[:, :9].any() and not red[:, 31:].any()
    assert corner.shape == (3, 40, 40)
    assert head_crops(pixels, [], 40, 0.0).shape == (0, 3, 40, 40)


@pytest.mark.parametrize("backbone", ["resnet", "convnext"])
def test_saved_and_loaded_is_the_same_network(tmp_path: Path, backbone: str) -> None:
    model = PoseCNN(CNNConfig(backbone, (8, 16), (1, 1), 32, 0.1)).eval()
    crops = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    save_cnn(tmp_path / "cnn", model, {"steps": 1})
    loaded = load_cnn(tmp_path / "cnn")
    with torch.no_grad():
        assert torch.equal(loaded.model(crops), model(crops))
    assert loaded.notes == {"steps": 1}


@pytest.mark.parametrize(("damage", "said"), [("weights", "cannot be read"), ("gone", "no crop network")])
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: str, said: str) -> None:
    save_cnn(tmp_path / "cnn", PoseCNN(CNNConfig("resnet", (8,), (1,), 16, 0.1)), {})
    if damage == "weights":
        (tmp_path / "cnn" / "model.safetensors").write_bytes(b"no")
    else:
        (tmp_path / "cnn" / "cnn.json").unlink()
    with pytest.raises(UserError, match=said):
        load_cnn(tmp_path / "cnn")


def train(ranks: int, *words: str) -> None:
    """`cogvlm-hpe train-cnn` in processes of its own, as every rank is: what goes wrong in one ends it at once."""
    said = Path(words[-1]).with_suffix(".log")
    running = Ranks(ranks, cli.main, ["train-cnn", *words], said=said)
    assert running.wait() == 0, running.said


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(tmp_path: Path, tiny_set: Callable[..., Path]) -> None:
    # Without batch norm, whose means are of a rank's own heads. Half of the images have two heads, so shares differ.
    words = ["--shards", str(tiny_set(samples=12)), "--steps", "6", "--batch", "6", "--backbone", "convnext"]
    words += ["--widths", "8,16", "--depths", "1,1", "--crop-px", "32"]
    for ranks in (1, 2):
        train(ranks, *words, "--out", str(tmp_path / str(ranks)))
    one, two = (load_cnn(tmp_path / str(ranks)) for ranks in (1, 2))
    assert (one.notes["ranks"], two.notes["ranks"]) == (1, 2)
    torch.manual_seed(1)  # as --seed
    fresh = PoseCNN(one.model.config).state_dict()
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(one.model.state_dict()[name], weight) for name, weight in fresh.items())


@pytest.mark.slow
def test_trained_on_shards_and_judged_like_any_other_system(tmp_path: Path, tiny_set: Callable[..., Path]) -> None:
    shard_set = tiny_set(samples=12)
    words = ["--shards", str(shard_set), "--steps", "250", "--batch", "6", "--lr", "5e-3", *SMALL]
    train(1, *words, "--out", str(tmp_path / "cnn"))
    judged = ["evaluate", "--model", str(tmp_path / "cnn"), "--shards", str(shard_set), "--out", str(tmp_path / "r")]
    assert cli.main(judged) == 0
    scores = json.loads((tmp_path / "r" / "metrics.json").read_text())["tasks"]
    assert set(scores) == {"pose"}
    rows = [json.loads(line) for line in (tmp_path / "r" / "predictions.jsonl").read_text().splitlines()]
    errors = [row["errors"]["geodesic"] for row in rows]
    assert all(row["kind"] == "pose" for row in rows)
    assert np.mean(errors) < 0.85 * scores["pose"]["constant_pose"]["geodesic"]["mean"]
    assert any(row["parsed"]["yaw"] != round(row["parsed"]["yaw"]) for row in rows), "exact, not as rounded in the text"
    assert cli.main([*judged[:-1], str(tmp_path / "x"), "--adapter", str(tmp_path)]) == 2
    assert cli.main(["train-cnn", *words, "--out", str(tmp_path / "cnn")]) == 2
