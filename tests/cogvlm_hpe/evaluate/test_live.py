"""Totals while it runs."""

from cogvlm_hpe.evaluate.live import Totals
from launcher.comm import single


def test_live_totals_are_those_of_all_rows_so_far() -> None:
    poses = [{"task": "pose", "errors": {"yaw": 3.0, "pitch": 6.0, "roll": 0.0}}, {"task": "pose", "errors": None}]
    boxes = [{"task": "where", "errors": {"iou": iou}} for iou in (0.5, 0.4, 0.9, 0.8)]
    totals = Totals()
    assert totals.text() == ""
    totals.add(poses, 2)
    assert totals.reduce(single()) == 2 and totals.text() == "MAE 3.0 deg, valid 50 %"
    totals.add([*boxes, poses[1]], 3)
    assert totals.reduce(single()) == 3 and totals.finish() == 0
    assert totals.text() == "MAE 3.0 deg, valid 33 %, grounding 75 %"
