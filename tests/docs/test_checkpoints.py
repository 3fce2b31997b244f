"""The example of docs/checkpoints.md runs as it stands, with other paths and on the CPU."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from cogvlm_hpe.model.folders import resolve_base

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_python_example_runs(tmp_path: Path) -> None:
    picture = tmp_path / "people.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(picture)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    tiny = str(resolve_base("tiny"))
    elsewhere = {
        "/models/cogvlm-grounding-generalist-hf": tiny,
        "/models/vicuna-7b-v1.5": tiny,
        "people.jpg": str(picture),
        '"cuda"': '"cpu"',
    }
    for said, here in elsewhere.items():
        assert said in code
        code = code.replace(said, here)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["answer"].kind in ("box", "pose", "blended", "out_of_range", "other")
    assert names["logits"].shape[:2] == names["asked"]["branch_input_ids"].shape
