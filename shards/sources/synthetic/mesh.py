"""Triangle meshes ready for the rasteriser, and the primitives they are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shards.sources.synthetic.surface import PLAIN

Array = np.ndarray


@dataclass(frozen=True)
class Mesh:
    """N vertices, M triangles; float32 and int32 throughout.

    position, normal, chart, colour: (N, 3). chart: where a point lies on the surface, for materials.
    faces: (M, 3). material, shine: (M,). rigid: (N,) 1 where a vertex turns with the head, 0 with the bust.
    boxed: (N,) vertices the head's box spans. owned: (M,) triangles that count as the labelled thing itself.
    """

    position: Array
    normal: Array
    chart: Array
    colour: Array
    faces: Array
    material: Array
    shine: Array
    rigid: Array
    boxed: Array
    owned: Array
    texture: Array | None = None


def make_mesh(
    position: Array,
    faces: Array,
    colour: Sequence[float] | Array,
    *,
    normal: Array | None = None,
    chart: Array | None = None,
    material: int = PLAIN,
    shine: float = 0.1,
    rigid: float = 1.0,
    boxed: bool = False,
    owned: bool = True,
) -> Mesh:
    """A mesh of one material; colour is one RGB (0..1) or one per vertex; normals are computed where not given."""
    n, m = len(position), len(faces)
    position = np.asarray(position, np.float32)
    faces = np.asarray(faces, np.int32)
    return Mesh(
        position=position,
        normal=vertex_normals(position, faces) if normal is None else np.asarray(normal, np.float32),
        chart=np.zeros((n, 3), np.float32) if chart is None else np.asarray(chart, np.float32),
        colour=np.ascontiguousarray(np.broadcast_to(np.asarray(colour, np.float32), (n, 3))),
        faces=faces,
        material=np.full(m, material, np.int32),
        shine=np.full(m, shine, np.float32),
        rigid=np.full(n, rigid, np.float32),
        boxed=np.full(n, boxed),
        owned=np.full(m, owned),
    )


def join(parts: Sequence[Mesh]) -> Mesh:
    """One mesh of several; at most one of them may have a texture."""
    offsets = np.cumsum([0] + [len(part.position) for part in parts[:-1]])
    fields = ("position", "normal", "chart", "colour", "material", "shine", "rigid", "boxed", "owned")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    faces = np.concatenate([part.faces + np.int32(offset) for part, offset in zip(parts, offsets, strict=True)])
    textures = [part.texture for part in parts if part.texture is not None]
    return Mesh(faces=faces, texture=textures[0] if textures else None, **joined)


def moved(
    mesh: Mesh, rotation: Array | None = None, shift: Sequence[float] | Array = (0, 0, 0), scale: float = 1.0
) -> Mesh:
    """The mesh scaled, turned by (3, 3) `rotation`, then shifted."""
    position, normal = mesh.position * np.float32(scale), mesh.normal
    if rotation is not None:
        turn = np.asarray(rotation, np.float32).T
        position, normal = position @ turn, normal @ turn
    return replace(mesh, position=position + np.asarray(shift, np.float32), normal=normal)


def vertex_normals(position: Array, faces: Array) -> Array:
    """(N, 3) unit normals, each the area-weighted mean over the triangles around a vertex."""
    a, b, c = (position[faces[:, k]] for k in range(3))
    flat = np.cross(b - a, c - a).astype(np.float64)
    total = np.empty((len(position), 3))
    for axis in range(3):
        corners = [np.bincount(faces[:, k], flat[:, axis], len(position)) for k in range(3)]
        total[:, axis] = corners[0] + corners[1] + corners[2]
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return (total / np.maximum(length, 1e-12)).astype(np.float32)


def grid_faces(rows: int, columns: int, wrap: bool) -> Array:
    """Triangles of a (rows, columns) grid of vertices; wrap joins the last column to the first."""
    width = columns if wrap else columns - 1
    row, column = (index.ravel() for index in np.meshgrid(np.arange(rows - 1), np.arange(width), indexing="ij"))
    a, b = row * columns + column, row * columns + (column + 1) % columns
    return np.concatenate([np.stack([a, b, a + columns], 1), np.stack([b, b + columns, a + columns], 1)]).astype(
        np.int32
    )


def sphere(rows: int = 13, columns: int = 18) -> tuple[Array, Array]:
    """Vertices and faces of the unit sphere, poles on z."""
    polar = np.linspace(0, np.pi, rows)[:, None]
    around = np.linspace(0, 2 * np.pi, columns, endpoint=False)[None]
    z = np.broadcast_to(np.cos(polar), (rows, columns))
    points = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), z], -1)
    return points.reshape(-1, 3), grid_faces(rows, columns, wrap=True)


def lathe(profile: Sequence[tuple[float, float, float]], columns: int = 28) -> tuple[Array, Array]:
    """Surface around the y axis through rows of (y, radius along x, radius along z)."""
    around = np.linspace(0, 2 * np.pi, columns, endpoint=False)
    rows = [np.stack([rx * np.sin(around), np.full(columns, y), rz * np.cos(around)], 1) for y, rx, rz in profile]
    return np.concatenate(rows), grid_faces(len(rows), columns, wrap=True)


def torus(tube: float, rows: int = 28, columns: int = 12) -> tuple[Array, Array]:
    """A ring of outer radius 1 around z; `tube` is the tube's radius relative to the ring's."""
    around = np.linspace(0, 2 * np.pi, rows, endpoint=False)[:, None]
    across = np.linspace(0, 2 * np.pi, columns, endpoint=False)[None]
    radius = 1 + tube * np.cos(across)
    z = np.broadcast_to(tube * np.sin(across), (rows, columns))
    points = np.stack([radius * np.cos(around), radius * np.sin(around), z], -1) / (1 + tube)
    faces = grid_faces(rows + 1, columns, wrap=True) % (rows * columns)
    return points.reshape(-1, 3), faces


def cube() -> tuple[Array, Array]:
    """The cube of side 2, with separate corners on each side so that its edges are sharp."""
    side = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], float)
    turns = [np.eye(3)[list(order)] * np.array(signs)[:, None] for order, signs in _CUBE_TURNS]
    faces = np.concatenate([np.array([[0, 1, 2], [0, 2, 3]]) + 4 * k for k in range(6)])
    return np.concatenate([side @ turn for turn in turns]), faces


_CUBE_TURNS = (
    ((0, 1, 2), (1, 1, 1)),
    ((0, 1, 2), (-1, 1, -1)),
    ((1, 2, 0), (1, 1, 1)),
    ((1, 2, 0), (-1, 1, -1)),
    ((2, 0, 1), (1, 1, 1)),
    ((2, 0, 1), (-1, 1, -1)),
)


def smoothstep(x: Array | float) -> Array:
    """0 below 0, 1 above 1, smooth between."""
    t = np.clip(x, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)
