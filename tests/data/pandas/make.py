"""Writes the pickles beside this file, in an environment that has the pandas of their names: python make.py

pandas-1.1.pkl comes from pandas 1.5, with the block manager pickled as pandas 1.1 pickled it (its `__getstate__`).
"""

import copyreg
import pickle
from pathlib import Path

import numpy as np
import pandas
from pandas.core.internals.managers import BlockManager

HERE = Path(__file__).parent


def table() -> pandas.DataFrame:
    """Every kind of value that AGORA's tables hold, and arrays in every order."""
    grid = np.arange(6, dtype=np.float64).reshape(2, 3) / 4
    frame = pandas.DataFrame(
        {
            "imgPath": ["a_hdri_00001.png", "b_cam00_00002.png"],
            "camX": [1.5, -275.0],
            "number": [7, 8],
            "valid": [True, False],
            "X": [[1.25, np.float64(2.5)], [np.float32(-3.0)]],
            "kid": [[True, np.bool_(False)], [False]],
        }
    )
    frame.insert(column="joints", loc=1, value=len(frame) * [""])
    frame["joints"] = [[grid, grid.T, np.asfortranarray(grid)], [grid[:, ::-1].astype(">f4")]]
    return frame


class Old(pickle._Pickler):
    """pandas 1.1's form of a block manager."""

    def reducer_override(self, value):
        if not isinstance(value, BlockManager):
            return NotImplemented
        blocks = [{"values": block.values, "mgr_locs": block.mgr_locs.indexer} for block in value.blocks]
        items = [value.items[block.mgr_locs.indexer] for block in value.blocks]
        old = {"0.14.1": {"axes": list(value.axes), "blocks": blocks}}
        state = (list(value.axes), [block["values"] for block in blocks], items, old)
        return copyreg.__newobj__, (BlockManager,), state


version = ".".join(pandas.__version__.split(".")[:2])
for protocol in (2, 4, 5):
    table().to_pickle(HERE / f"pandas-{version}-protocol-{protocol}.pkl", protocol=protocol)
if version == "1.5":
    with (HERE / "pandas-1.1-protocol-4.pkl").open("wb") as file:
        Old(file, 4).dump(table())
    assert pandas.read_pickle(HERE / "pandas-1.1-protocol-4.pkl").shape == (2, 7)
