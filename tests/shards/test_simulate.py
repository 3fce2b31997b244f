"""Hundreds of ranks without a process: exactly once, evenly, over lost nodes; and a plan that fails is found out."""

import numpy as np
import pytest

from launcher.errors import UsageError
from shards.plan import Plan
from shards.shuffle import Ints, Key, Shuffle
from shards.simulate import Start, after_a_loss, simulate


@pytest.mark.slow
@pytest.mark.parametrize(("block_shards", "bucket_batches"), [(0, 0), (16, 0), (16, 8)])
def test_512_ranks_of_8_workers_read_each_sample_once(block_shards: int, bucket_batches: int) -> None:
    sizes = [1_000_000, 50_000]
    shards = [[1000] * (size // 1000) for size in sizes]
    heads = [np.arange(size) % 11 for size in sizes]
    plan = Plan(sizes, [0.9, 0.1], 3, 4096, block_shards, shards, bucket_batches, heads)
    steps = 300
    outcome = simulate(plan, [Start(0, steps, 512, 8)])
    assert outcome.problems == [] and outcome.images_a_rank == [(8, 8)] and outcome.batches_a_worker == [(37, 38)]
    drawn = [round(steps * 4096 * share) for share in (0.9, 0.1)]
    assert [sum(epochs) for epochs in outcome.epochs] == pytest.approx(drawn, abs=9)
    assert [epochs[:-1] for epochs in outcome.epochs] == [[1_000_000], [50_000] * 2]


def test_a_hundred_million_samples_need_no_table() -> None:
    """A window in the middle of the stream of the largest job; the whole epoch is what `hpe-shards simulate` does."""
    plan = Plan([100_000_000], [1.0], 1, 4096)
    rows = plan.batches(1_000_000, 1_000_064)
    assert len(np.unique(rows[1])) == 64 * 4096
    np.testing.assert_array_equal(plan.shuffles[0].places(rows[1], (1, 0, 40)), rows[3] - 40 * 100_000_000)


def test_a_lost_node_loses_no_sample_and_repeats_none_in_the_weights() -> None:
    plan = Plan([5000, 700], [3.0, 1.0], 5, 48)
    starts = after_a_loss(200, 16, 3, lose_at=117, world_after=12, save_every=25)
    assert starts == [Start(0, 117, 16, 3), Start(100, 200, 12, 3)]
    outcome = simulate(plan, starts)
    assert outcome.problems == [] and outcome.repeated_steps == 17
    assert outcome.images_a_rank == [(3, 3), (4, 4)]
    assert outcome.epochs == simulate(plan, [Start(0, 200, 1, 0)]).epochs


def test_what_is_dealt_is_what_ranks_ask_for() -> None:
    heads = [np.arange(900) % 5]
    plan = Plan([900], [1.0], 5, 24, bucket_batches=4, heads=heads)
    rows = plan.batches(2, 7)
    for n in range(2, 7):
        asked = [slot for rank in range(8) for slot in plan.share_at(n, rank, 8)]
        assert [list(slot) for slot in asked] == rows[:, (n - 2) * 24 : (n - 1) * 24].T.tolist()


def test_buckets_even_out_the_heads_of_ranks() -> None:
    heads = [np.random.default_rng(0).geometric(0.15, 4000)]
    load = {
        buckets: simulate(
            Plan([4000], [1.0], 5, 64, bucket_batches=buckets, heads=heads), [Start(0, 60, 16, 0)], heads
        ).heads_a_rank[0]
        for buckets in (0, 16)
    }
    assert 1.0 < load[16] < 1.0 + 0.6 * (load[0] - 1.0)


class Broken(Shuffle):
    """Forgets a sample, and gives another one twice."""

    def samples(self, places: Ints, key: Key) -> Ints:
        found = super().samples(places, key)
        return np.where(found == 7, 8, found)


def test_a_plan_that_repeats_a_sample_is_found_out() -> None:
    plan = Plan([100], [1.0], 0, 10)
    plan.shuffles = [Broken(100)]
    outcome = simulate(plan, [Start(0, 20, 2, 0)])
    assert outcome.problems == [f"set 0, epoch {k}: of 100 draws 1 came before" for k in (0, 1)]


def test_jobs_that_cannot_be_meant() -> None:
    plan = Plan([100], [1.0], 0, 10)
    with pytest.raises(UsageError, match="must be a multiple of the 3 ranks"):
        simulate(plan, [Start(0, 5, 3, 0)])
    with pytest.raises(UsageError, match="a gap"):
        simulate(plan, [Start(0, 5, 1, 0), Start(6, 9, 1, 0)])
    with pytest.raises(UsageError, match="must lie within the job"):
        after_a_loss(10, 1, 0, 10, 1, 5)
