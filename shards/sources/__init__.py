"""One file or folder per data set; each name below is a word after `hpe-shards build`.

A source brings `add_arguments(parser)` and `from_args(options) -> Source`; what is heavy is imported by the latter.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from shards.sources import (
    agora,
    biwi,
    cogvlm,
    crowdhuman,
    flickr30k,
    panoptic,
    refcoco,
    synthetic,
    table,
    visual7w,
    w300lp,
)

if TYPE_CHECKING:
    from shards.write import Source

SOURCES: "dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Source]]]" = {
    "300w-lp": (w300lp.add_300wlp_arguments, w300lp.from_300wlp_args),
    "aflw2000": (w300lp.add_aflw2000_arguments, w300lp.from_aflw2000_args),
    "agora": (agora.add_arguments, agora.from_args),
    "biwi": (biwi.add_arguments, biwi.from_args),
    "cogvlm": (cogvlm.add_arguments, cogvlm.from_args),
    "crowdhuman": (crowdhuman.add_arguments, crowdhuman.from_args),
    "flickr30k": (flickr30k.add_arguments, flickr30k.from_args),
    "panoptic": (panoptic.add_arguments, panoptic.from_args),
    "refcoco": (refcoco.add_arguments, refcoco.from_args),
    "synthetic": (synthetic.add_arguments, synthetic.from_args),
    "table": (table.add_arguments, table.from_args),
    "visual7w": (visual7w.add_arguments, visual7w.from_args),
}
