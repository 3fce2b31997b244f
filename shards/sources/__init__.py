"""One file or folder per data set; each name below is a word after `hpe-shards build`.

A source brings `add_arguments(parser)` and `from_args(options) -> Source`; what is heavy is imported by the latter.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from shards.sources import synthetic

if TYPE_CHECKING:
    from shards.write import Source

SOURCES: "dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Source]]]" = {
    "synthetic": (synthetic.add_arguments, synthetic.from_args),
}
