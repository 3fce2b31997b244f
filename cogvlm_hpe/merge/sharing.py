"""Which rank works on which layers."""

from collections.abc import Mapping

from cogvlm_hpe.merge.factors import Factors
from launcher.comm import Comm


def share_of(sizes: Mapping[str, int], comm: Comm) -> list[str]:
    """This rank's layers, sorted: the largest first, each goes to the rank that has least so far."""
    loads, mine = [0] * comm.size, []
    for layer in sorted(sizes, key=lambda layer: (-sizes[layer], layer)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[layer]
        if rank == comm.rank:
            mine.append(layer)
    return sorted(mine)


def sizes_of(factors: Factors) -> dict[str, int]:
    """Layer → elements of its weight."""
    return {layer: len(factor.b) * factor.a.shape[1] for layer, factor in factors.items()}
