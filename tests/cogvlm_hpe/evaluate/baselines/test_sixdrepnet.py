"""6DRepNet beside the package its authors published: same file, same numbers."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from cogvlm_hpe.evaluate.baselines import sixdrepnet
from launcher.errors import UserError
from shards import pose


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    """model.py of the package `sixdrepnet` alone: the package itself imports torchvision and downloads weights."""
    found = importlib.util.find_spec("sixdrepnet")  # finds the folder and imports nothing of it
    if found is None or not found.submodule_search_locations:
        pytest.skip("SKIPPED: the package sixdrepnet is not installed (make test installs it)")
    folder = Path(found.submodule_search_locations[0])
    # Their utils.py imports cv2 for drawing only; nothing of it is called here.
    sys.modules.setdefault("cv2", types.ModuleType("cv2"))
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("published_sixdrepnet", folder / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        if not getattr(sys.modules["cv2"], "__file__", None):
            del sys.modules["cv2"]
    return module


@pytest.fixture(scope="module", params=[True, False], ids=["deploy", "as-trained"])
def pair(request: pytest.FixtureRequest, theirs: types.ModuleType, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """Their network with random weights, and its file."""
    torch.manual_seed(3)
    network = theirs.SixDRepNet("RepVGG-B1g2", "", deploy=request.param, pretrained=False).eval()
    for name, tensor in network.state_dict().items():
        if "running_mean" in name or name.endswith(".bias"):
            tensor.normal_(0, 0.1)
        elif "rbr_reparam" in name:  # so that a crop is still to be seen at the end of 28 layers without batch norm
            tensor.normal_(0, (2.0 / tensor[0].numel()) ** 0.5)
        elif "running_var" in name:
            tensor.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("six") / "6DRepNet.pth"
    torch.save(network.state_dict() if request.param else {"epoch": 3, "model_state_dict": network.state_dict()}, path)
    return network, path


@pytest.mark.slow
def test_their_weights_give_their_angles(pair: tuple[torch.nn.Module, Path], theirs: types.ModuleType) -> None:
    network, path = pair
    ours = sixdrepnet.load_sixdrepnet(path)
    crops = torch.randint(0, 256, (3, 3, 256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (crops[..., 16:240, 16:240] / 255.0 - mean) / std
    with torch.no_grad():
        r6 = network(pixels)
        assert torch.allclose(ours.published(pixels), r6, atol=1e-6)
        angles = torch.rad2deg(theirs.utils.compute_euler_angles_from_rotation_matrices(r6))
        assert torch.allclose(sixdrepnet.published_angles_deg(r6), angles, atol=1e-4)
        rotations = ours(crops).double().numpy()
    assert r6.std(dim=0).max() > 1e-4, "all crops alike would prove nothing"
    again = pose.from_6drepnet(r6.double().numpy())
    assert abs(rotations - again).max() < 1e-5
    # Their pitch, yaw and roll are ours wherever their range (yaw within ±90) and ours (pitch within ±90) meet.
    triples = pose.pose_from_rotation(again)
    for (pitch, yaw, roll), ours_deg in zip(angles.tolist(), triples.tolist(), strict=True):
        if abs(pitch) < 90:
            assert ours_deg == pytest.approx([yaw, pitch, roll], abs=1e-3)


def test_published_angles_of_known_rotations_and_at_gimbal_lock(theirs: types.ModuleType) -> None:
    triples = torch.rand(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 360 - 180
    triples[:40, 1] = 90.0
    r6 = torch.stack([torch.from_numpy(theirs.utils.get_R(*row)) for row in torch.deg2rad(triples).numpy()])
    ours = sixdrepnet.published_angles_deg(r6)
    their_deg = torch.rad2deg(theirs.utils.compute_euler_angles_from_rotation_matrices(r6).double())
    apart = (ours - their_deg).abs() % 360
    assert torch.minimum(apart, 360 - apart).max() < 1e-3  # theirs is float32 inside


def test_a_file_in_the_form_before_torch_1_6_is_read(tmp_path: Path) -> None:
    state = {"layer0.rbr_reparam.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="tensors differ"):  # read, and told from 6DRepNet's
        sixdrepnet.load_sixdrepnet(tmp_path / "old.pth")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"layer0.rbr_reparam.weight": torch.zeros(3)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"no weights")
    torch.save([Path("x")], tmp_path / "c.pth")  # a class that weights_only does not know
    with pytest.raises(UserError, match=r"a\.pth: not 6DRepNet with RepVGG-B1g2: .* tensors differ"):
        sixdrepnet.load_sixdrepnet(tmp_path / "a.pth")
    for name in ("b.pth", "c.pth"):
        with pytest.raises(UserError, match="reads safely"):
            sixdrepnet.load_sixdrepnet(tmp_path / name)
