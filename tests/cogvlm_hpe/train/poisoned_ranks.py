"""What each rank of test_survival.py does where a base makes one sample's loss infinite: steps until one is refused."""

import json
import sys
from pathlib import Path

import numpy as np

from cogvlm_hpe.train.command import parse
from cogvlm_hpe.train.loop import Tally, next_batches, train_step
from cogvlm_hpe.train.setup import setup
from launcher.comm import from_torch
from launcher.errors import UserError
from launcher.world import discover


def main(out: Path, argv: list[str]) -> None:
    world = discover()
    run = setup(parse(argv)[0], world, from_torch(world), resume=False, allow_change=False)
    batches, tally, said, step = iter(run.stream), Tally(), "", 0
    run.engine.set_lr(0.01)
    while not said:
        before = run.engine.weights()
        micro_batches = next_batches(run, batches, tally)
        n_global = run.comm.sum(np.array(sum(batch.n_answers for batch in micro_batches)))
        keys = [key for batch in micro_batches for key in batch.keys]
        try:
            train_step(run, step, micro_batches, int(n_global), tally)
        except UserError as error:
            said = str(error)
        step += 1
    after = run.engine.weights()
    same = all(before[name].equal(after[name]) for name in before)
    out.with_suffix(f".{world.rank}").write_text(json.dumps({"said": said, "same": same, "keys": keys, "step": step}))


main(Path(sys.argv[1]), sys.argv[2:])
