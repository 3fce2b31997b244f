"""The words that name things in a scene. Every expression names exactly one thing in its image."""

from collections.abc import Sequence

Box = tuple[float, float, float, float]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.82, 0.10, 0.08),
    "blue": (0.12, 0.25, 0.85),
    "green": (0.08, 0.58, 0.18),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.52, 0.16, 0.68),
    "orange": (0.96, 0.48, 0.06),
    "white": (0.94, 0.94, 0.94),
    "black": (0.07, 0.07, 0.08),
}
SHAPES = ("cube", "ball", "cone", "cylinder")
SHAPES_B = (*SHAPES, "ring", "vase")

VOCABULARY = frozenset({*COLOURS, *SHAPES_B, "head", "left", "right", "largest"})
"""All the words of all expressions."""

_SIDE_MARGIN = 0.12
_LARGER = 1.3


def head_expressions(boxes: Sequence[Box], width_px: int) -> list[tuple[str, int]]:
    """(expression, index of the head) for what can be said of the heads with these boxes without a doubt.

    One head is "head". Of several, the outermost is "left head" or "right head" where its centre lies clear of the
    next, and "largest head" has at least 1.3 times the area of the next.
    """
    if len(boxes) == 1:
        return [("head", 0)]
    if not boxes:
        return []
    found = []
    order = sorted(range(len(boxes)), key=lambda i: boxes[i][0] + boxes[i][2])
    centres = [(boxes[i][0] + boxes[i][2]) / 2 for i in order]
    if centres[1] - centres[0] >= _SIDE_MARGIN * width_px:
        found.append(("left head", order[0]))
    if centres[-1] - centres[-2] >= _SIDE_MARGIN * width_px:
        found.append(("right head", order[-1]))
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    by_area = sorted(range(len(boxes)), key=lambda i: areas[i])
    if areas[by_area[-1]] >= _LARGER * areas[by_area[-2]]:
        found.append(("largest head", by_area[-1]))
    return found
