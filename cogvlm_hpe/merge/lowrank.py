"""The nearest adapter to changes of full rank: for a text-only adapter there are no dense weights to write."""

import torch
from torch import Tensor

from cogvlm_hpe.merge.factors import Factor, Factors
from cogvlm_hpe.merge.methods import Changes
from cogvlm_hpe.merge.sharing import share_of
from launcher.comm import Comm
from launcher.progress import track

_OVERSAMPLING = 16
_ITERATIONS = 6


def nearest(changes: Changes, rank: int, comm: Comm) -> tuple[Factors, dict[str, float]]:
    """All ranks. On rank 0, factors of at most `rank` for each layer and what is lost of each: ‖ΔW - BA‖ / ‖ΔW‖.

    The layers are shared out over the ranks. A rank that reaches the layer's smaller side keeps it exactly.
    """
    sizes = {layer: n_out * n_in for layer, (n_out, n_in) in changes.shapes().items()}
    mine = {}
    for layer in track(share_of(sizes, comm), "factorise", comm=comm):
        mine[layer] = _nearest(changes.change(layer), rank)
    found = {layer: both for part in comm.gather(mine) or [] for layer, both in part.items()}
    layers = sorted(found)
    return {layer: found[layer][0] for layer in layers}, {layer: found[layer][1] for layer in layers}


def _nearest(change: Tensor, rank: int) -> tuple[Factor, float]:
    n_out, n_in = change.shape
    if rank >= min(n_out, n_in):
        identity = torch.eye(min(n_out, n_in))
        return (Factor(change, identity, 1.0) if n_out <= n_in else Factor(identity, change, 1.0)), 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the method starts from random directions: the same ones in every run
        size = min(rank + _OVERSAMPLING, n_out, n_in)
        left, values, right = torch.svd_lowrank(change, q=size, niter=_ITERATIONS)
    root = values[:rank].sqrt()
    factor = Factor((right[:, :rank] * root).T.contiguous(), left[:, :rank] * root, 1.0)
    total = float(torch.linalg.vector_norm(change))
    lost = float(torch.linalg.vector_norm(change.sub_(factor.b @ factor.a)))
    return factor, lost / total if total else 0.0
