"""Lays out a scene: who and what is where, seen by which camera; all drawn from one seed."""

from dataclasses import dataclass, replace

import numpy as np

from shards import pose
from shards.sources.synthetic import solids
from shards.sources.synthetic.domains import GROUP, Domain, identities
from shards.sources.synthetic.mesh import Mesh, moved
from shards.sources.synthetic.raster import Batch, Visibility, bend, measure, project_extent, see
from shards.sources.synthetic.words import COLOURS, Box

Array = np.ndarray
Rng = np.random.Generator

HEAD_HEIGHT_M = 0.235
REFERENCE_PX = 112
_HEAD_PX = {1: (40.0, 62.0), 2: (36.0, 54.0), 3: (34.0, 43.0), 4: (28.0, 34.0), 5: (24.0, 30.0)}
_SOLID_PX = (18.0, 36.0)
_MANY_HEADS_PX = 224
_LAYOUTS = 10
_GOOD_HEAD, _GOOD_SOLID = 0.65, 0.5
_PIVOT = np.array([0.0, -0.085, -0.035])
_MAX_ROLL_DEG = 90.0


@dataclass(frozen=True)
class PlacedHead:
    """A posed head: rotation is M (3, 3); box: its vertices' projection, clipped to the image, in pixels."""

    subject: str
    rotation: Array
    box: Box
    visible: float = 0.0


@dataclass(frozen=True)
class PlacedSolid:
    """A solid; box: where it can be seen, in pixels; None where it cannot."""

    name: str
    box: Box | None = None
    visible: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything needed to shade the picture and to label it."""

    group: str
    focal_px: float
    heads: list[PlacedHead]
    solids: list[PlacedSolid]
    batch: Batch
    seen: Visibility

    @property
    def quality(self) -> float:
        """How well the worst seen thing is seen, 1 where all is well."""
        heads = [head.visible / _GOOD_HEAD for head in self.heads]
        return min([1.0, *heads, *(solid.visible / _GOOD_SOLID for solid in self.solids)])


@dataclass(frozen=True)
class _Cast:
    """Who and what a scene shows, before it is known where."""

    subjects: list[str]
    meshes: list[Mesh]
    rotations: Array
    bust_rotations: Array
    solids: list[tuple[str, str]]
    solid_meshes: list[Mesh]


@dataclass(frozen=True)
class _Spot:
    x: float
    y: float
    px: float


def compose(domain: Domain, split: str, rng: Rng, size_px: int, load: "HeadLoader") -> Scene:
    """A scene of `split`: the first layout in which everything can be seen well, or the best of a few."""
    subjects = identities(domain, split)
    first = int(rng.integers(len(subjects) // GROUP)) * GROUP
    group = f"{domain.name}-{split}-group{first // GROUP:03d}"
    counts, odds = zip(*domain.heads, strict=True)
    count = 4 if size_px >= _MANY_HEADS_PX and rng.random() < 0.15 else int(rng.choice(counts, p=odds))
    chosen = [subjects[first + k] for k in rng.choice(GROUP, count, replace=False)]
    half_view = np.radians(rng.uniform(*domain.hfov_deg)) / 2
    focal_px = size_px / 2 / float(np.tan(half_view))
    camera_pitch_deg = float(np.clip(rng.normal(*domain.camera_pitch_deg), -50, 40))
    rotations, bust_rotations = sample_rotations(count, rng, camera_pitch_deg)
    pairs = _choose_solids(domain, rng)
    meshes, solid_meshes = [load(domain, subject) for subject in chosen], solids.make_solids(pairs, rng)
    cast = _Cast(chosen, meshes, rotations, bust_rotations, pairs, solid_meshes)
    best: Scene | None = None
    for _ in range(_LAYOUTS):
        scene = _layout(cast, group, focal_px, rng, size_px)
        if best is None or scene.quality > best.quality:
            best = scene
        if best.quality >= 1.0:
            break
    assert best is not None
    return best


class HeadLoader:
    """Makes heads by subject and keeps the last few hundred (a head is about 0.5 MB)."""

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._heads: dict[str, Mesh] = {}

    def __call__(self, domain: Domain, subject: str) -> Mesh:
        """The head mesh of `subject`."""
        mesh = self._heads.pop(subject, None)
        if mesh is None:
            mesh = domain.make_head(subject, domain.name)
            if len(self._heads) >= self._capacity:
                self._heads.pop(next(iter(self._heads)))
        self._heads[subject] = mesh
        return mesh


def _choose_solids(domain: Domain, rng: Rng) -> list[tuple[str, str]]:
    pairs = [(colour, shape) for colour in COLOURS for shape in domain.shapes]
    count = int(rng.integers(1, 5))
    return [pairs[k] for k in rng.choice(len(pairs), count, replace=False)]


def sample_rotations(count: int, rng: Rng, camera_pitch_deg: float) -> tuple[Array, Array]:
    """M (count, 3, 3) of heads and of the busts below them: heading, nod and tilt in the room, then the camera's pitch.

    Heads whose canonical |roll| would reach 90 degrees are drawn again.
    """
    heading_deg, heads = np.zeros(0), np.zeros((0, 3, 3))
    while len(heads) < count:
        drawn = rng.uniform(-180, 180, count)
        posture = pose.rotation_from_pose(0.0, rng.normal(0, 14, count), rng.normal(0, 9, count))
        seen = pose.rotation_from_pose(drawn, camera_pitch_deg, 0.0) @ posture
        upright = np.abs(pose.pose_from_rotation(seen)[:, 2]) < _MAX_ROLL_DEG
        heading_deg, heads = np.append(heading_deg, drawn[upright]), np.concatenate([heads, seen[upright]])
    turn_deg = np.clip(rng.normal(0, 22, count), -50, 50)
    lean = pose.rotation_from_pose(0.0, rng.normal(0, 3, count), rng.normal(0, 3, count))
    return heads[:count], pose.rotation_from_pose(heading_deg[:count] + turn_deg, camera_pitch_deg, 0.0) @ lean


def _layout(cast: _Cast, group: str, focal_px: float, rng: Rng, size_px: int) -> Scene:
    spots = _place_heads(len(cast.meshes), rng, size_px)
    solid_spots = _place_solids(len(cast.solids), spots, rng, size_px)
    heads, placed = [], []
    for k, spot in enumerate(spots):
        centre = _unproject(spot, focal_px * HEAD_HEIGHT_M / spot.px, focal_px, size_px)
        head, bust = (m @ pose.HEAD_TO_CAMERA for m in (cast.rotations[k], cast.bust_rotations[k]))
        posed = bend(cast.meshes[k], head, bust, _PIVOT, centre)
        posed, box = _into_frame(posed, focal_px, size_px)
        heads.append(PlacedHead(cast.subjects[k], cast.rotations[k], box))
        placed.append(posed)
    nearest_m, farthest_m = (focal_px * HEAD_HEIGHT_M / pick(spot.px for spot in spots) for pick in (max, min))
    for mesh, spot in zip(cast.solid_meshes, solid_spots, strict=True):
        # Well before or well behind the busts, so that nothing is stuck in anything.
        depth_m = 0.6 * nearest_m if rng.random() < 0.6 else 1.45 * farthest_m
        centre = _unproject(spot, depth_m, focal_px, size_px)
        placed.append(moved(mesh, shift=centre, scale=spot.px / focal_px * depth_m / 2))
    batch = _gather(placed)
    seen = see(batch, focal_px, size_px)
    named = [PlacedSolid(f"{colour} {shape}") for colour, shape in cast.solids]
    return _measure(Scene(group, focal_px, heads, named, batch, seen))


def _place_heads(count: int, rng: Rng, size_px: int) -> list[_Spot]:
    """Centres and heights, large first; no head over another or behind another's bust, where that can be had."""
    scale = size_px / REFERENCE_PX
    low, high = _HEAD_PX[count]
    shrink = 1.0
    while True:
        heights = sorted(rng.uniform(low, high, count) * scale * shrink, reverse=True)
        spots: list[_Spot] = []
        for px in heights:
            for _ in range(40):
                x, y = rng.uniform(0.46 * px, size_px - 0.46 * px), rng.uniform(0.54 * px, size_px - 0.60 * px)
                spot = _Spot(float(x), float(y), float(px))
                if not any(_clash(spot, other) for other in spots):
                    spots.append(spot)
                    break
        if len(spots) == count:
            order = rng.permutation(count)
            return [spots[k] for k in order]
        shrink = max(0.75, shrink * 0.985)


def _clash(back: _Spot, front: _Spot) -> bool:
    """Whether the head at `back` (smaller, farther) would be hidden much by the head or bust at `front`."""
    across, below = abs(back.x - front.x), back.y - front.y
    beside_head = across < 0.40 * (back.px + front.px)
    beside_bust = across < 0.36 * back.px + 0.62 * front.px
    over_head = abs(below) < 0.46 * (back.px + front.px)
    over_bust = 0 < below < 0.42 * back.px + 0.95 * front.px
    return (beside_head and over_head) or (beside_bust and over_bust)


def _place_solids(count: int, heads: list[_Spot], rng: Rng, size_px: int) -> list[_Spot]:
    """Where solids hide little of the heads and of each other."""
    scale = size_px / REFERENCE_PX
    spots: list[_Spot] = []
    for _ in range(count):
        best, best_gap = _Spot(size_px / 2, size_px / 2, _SOLID_PX[0] * scale), -np.inf
        for _ in range(25):
            px = rng.uniform(*_SOLID_PX) * scale
            x, y = rng.uniform(0.45 * px, size_px - 0.45 * px, 2)
            gaps = [max(abs(x - h.x) - 0.42 * h.px, abs(y - h.y) - 0.5 * h.px) - 0.42 * px for h in heads]
            gaps += [np.hypot(x - s.x, y - s.y) - 0.42 * (px + s.px) for s in spots]
            gap = float(min(gaps)) / scale
            if gap > best_gap:
                best, best_gap = _Spot(float(x), float(y), float(px)), gap
            if best_gap > -2.0:
                break
        spots.append(best)
    return spots


def _unproject(spot: _Spot, depth_m: float, focal_px: float, size_px: int) -> Array:
    half = size_px / 2
    return np.array([(spot.x - half) / focal_px, (spot.y - half) / focal_px, 1.0]) * depth_m


def _into_frame(mesh: Mesh, focal_px: float, size_px: int) -> tuple[Mesh, Box]:
    """The head shifted, where needed, so that its box lies inside the image; and the box."""
    low, high, near_m = project_extent(mesh, focal_px, size_px)
    over = np.maximum(0.0, 1.0 - low) - np.maximum(0.0, high - (size_px - 1.0))
    if np.any(over):
        shift = np.append(over * near_m / focal_px, 0.0).astype(np.float32)
        mesh = replace(mesh, position=mesh.position + shift)
        low, high, _ = project_extent(mesh, focal_px, size_px)
    low, high = np.clip(low, 0.0, size_px), np.clip(high, 0.0, size_px)
    return mesh, (float(low[0]), float(low[1]), float(high[0]), float(high[1]))


def _gather(meshes: list[Mesh]) -> Batch:
    offsets = np.cumsum([0] + [len(mesh.position) for mesh in meshes[:-1]])
    textures = [mesh.texture for mesh in meshes if mesh.texture is not None]
    textured = np.cumsum([mesh.texture is not None for mesh in meshes]) - 1
    return Batch(
        position=np.concatenate([mesh.position for mesh in meshes]),
        normal=np.concatenate([mesh.normal for mesh in meshes]),
        chart=np.concatenate([mesh.chart for mesh in meshes]),
        colour=np.concatenate([mesh.colour for mesh in meshes]),
        faces=np.concatenate([mesh.faces + np.int32(offset) for mesh, offset in zip(meshes, offsets, strict=True)]),
        texture=np.concatenate(
            [np.where(m.material >= 0, np.int32(k), m.material) for m, k in zip(meshes, textured, strict=True)]
        ).astype(np.int32),
        shine=np.concatenate([mesh.shine for mesh in meshes]),
        slot=np.concatenate([np.where(mesh.owned, k, -1) for k, mesh in enumerate(meshes)]).astype(np.int32),
        textures=np.stack(textures) if textures else np.zeros((1, 1, 1, 3), np.uint8),
    )


def _measure(scene: Scene) -> Scene:
    """The scene with what the id map tells: visible shares, and the solids' visible boxes."""
    count = len(scene.heads)
    shares, boxes = measure(scene.batch, scene.seen, count + len(scene.solids))
    heads = [replace(head, visible=float(share)) for head, share in zip(scene.heads, shares[:count], strict=True)]
    found = []
    for solid, share, box in zip(scene.solids, shares[count:], boxes[count:], strict=True):
        x0, y0, x1, y1 = (float(edge) for edge in box)
        found.append(replace(solid, box=(x0, y0, x1, y1) if share > 0 else None, visible=float(share)))
    return replace(scene, heads=heads, solids=found)
