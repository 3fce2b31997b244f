"""What each rank of an order check runs: reads its share of global batches with real readers; rank 0 prints the keys.

order_ranks.py SETS SEED BATCH BLOCK_SHARDS BUCKET_BATCHES WORKERS START COUNT, where SETS is DIR:RATIO,DIR:RATIO,…
"""

import sys
from itertools import islice

from launcher.comm import mpi
from launcher.errors import run_main
from shards.index import open_set
from shards.plan import Plan
from shards.plans import set_and_ratio
from shards.stream import Stream


def main() -> None:
    places, ratios = zip(*map(set_and_ratio, sys.argv[1].split(",")), strict=True)
    seed, batch, block_shards, bucket_batches, workers, start, count = map(int, sys.argv[2:])
    comm, sets = mpi(), [open_set(place) for place in places]
    plan = Plan.of(sets, ratios, seed, batch, block_shards=block_shards, bucket_batches=bucket_batches)
    stream = Stream(sets, plan, comm.rank, comm.size, 16, start, workers)
    for n, items in islice(stream, count):
        shares = comm.gather([item.key for item in items])
        if shares is not None:
            print(n, *(key for share in shares for key in share), flush=True)


if __name__ == "__main__":
    sys.exit(run_main("order", main))
