"""One file or folder per data set; each name below is a word after `hpe-shards build`.

A source brings `add_arguments(parser)` and `from_args(options) -> Source`; what is heavy is imported by the latter.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

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

Entry: TypeAlias = "tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Source]]"

_MODULES = (agora, biwi, cogvlm, crowdhuman, flickr30k, panoptic, refcoco, synthetic, table, visual7w)
SOURCES: dict[str, Entry] = {
    "300w-lp": (w300lp.add_300wlp_arguments, w300lp.from_300wlp_args),
    "aflw2000": (w300lp.add_aflw2000_arguments, w300lp.from_aflw2000_args),
} | {module.__name__.rpartition(".")[2]: (module.add_arguments, module.from_args) for module in _MODULES}
