"""The order of samples: promises that hold for every size, mix, seed and batch."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UsageError
from shards.plan import MAX_PERIOD, Plan, Slot, consecutive_batches, is_mirrored, mix_weights, rank_slots
from shards.shuffle import shuffled

sizes_and_ratios = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=4)
seeds = st.integers(0, 2**40)


def stream(plan: Plan, batches: int) -> list[tuple[int, int, int, int]]:
    return [slot for n in range(batches) for slot in plan.batch_at(n)]


@given(st.integers(1, 3000), seeds, st.integers(0, 50))
def test_a_shuffle_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(np.arange(size), size, (seed, 0, epoch)).tolist()) == list(range(size))


@given(sizes_and_ratios, seeds, st.integers(1, 20))
@settings(max_examples=40)
def test_every_epoch_of_a_set_has_each_sample_once(mix: list[tuple[int, int]], seed: int, batch: int) -> None:
    sizes, ratios = zip(*mix, strict=True)
    plan = Plan(sizes, ratios, seed, batch)
    slots = stream(plan, -(-300 // batch))
    for k, size in enumerate(sizes):
        drawn = [slot for slot in slots if slot[0] == k]
        for epoch in range(len(drawn) // size):
            here = drawn[epoch * size : (epoch + 1) * size]
            assert {slot[2] for slot in here} == {epoch}
            assert sorted(slot[1] for slot in here) == list(range(size))


@given(sizes_and_ratios, seeds)
def test_ratios_are_exact_in_each_period_and_even_within(mix: list[tuple[int, int]], seed: int) -> None:
    sizes, ratios = zip(*mix, strict=True)
    plan = Plan(sizes, ratios, seed, batch=7)
    period = sum(plan.weights)
    assert [w * sum(ratios) for w in plan.weights] == [r * period for r in ratios]
    row = [slot[0] for slot in stream(plan, -(-3 * period // 7))]
    for turn in range(3):
        assert Counter(row[turn * period : (turn + 1) * period]) == dict(enumerate(plan.weights))
    for upto in range(1, period + 1):
        counts = Counter(row[:upto])
        assert all(abs(counts[k] - upto * w / period) <= 1.0 + 1e-9 for k, w in enumerate(plan.weights))


@given(sizes_and_ratios, seeds, st.integers(1, 12), st.integers(0, 10**9))
def test_any_batch_size_cuts_the_same_row(mix: list[tuple[int, int]], seed: int, batch: int, n: int) -> None:
    sizes, ratios = zip(*mix, strict=True)
    cut = Plan(sizes, ratios, seed, batch).batch_at(n)
    assert [slot.position for slot in cut] == list(range(n * batch, (n + 1) * batch))
    one = Plan(sizes, ratios, seed, 1)
    assert cut == [one.batch_at(n * batch + k)[0] for k in range(batch)]


@given(st.integers(1, 16), st.integers(1, 6), st.integers(1, 5))
def test_ranks_share_a_batch_in_order_without_gap_or_overlap(share: int, size: int, micro: int) -> None:
    slots = Plan([50], [1.0], 3, share * size).batch_at(4)
    parts = [rank_slots(slots, rank, size, micro) for rank in range(size)]
    assert [slot for rank in parts for batch in rank for slot in batch] == slots
    assert {tuple(map(len, rank)) for rank in parts} == {tuple(map(len, parts[0]))}
    plan = Plan([50], [1.0], 3, share * size)
    assert [plan.share_at(4, rank, size) for rank in range(size)] == [sum(map(list, part), []) for part in parts]


def test_five_hundred_and_twelve_ranks() -> None:
    plan = Plan([100_000_000, 1_000_000], [0.9, 0.1], seed=1, batch=4096)
    slots = plan.batch_at(1_000_000)
    parts = [rank_slots(slots, rank, 512, 4) for rank in range(512)]
    assert [slot for rank in parts for batch in rank for slot in batch] == slots
    assert abs(sum(slot.set for slot in slots) - 409.6) <= 1
    assert all(0 <= slot.sample < plan.sizes[slot.set] for slot in slots)


def test_batches_run_over_epoch_borders() -> None:
    slots = Plan([5], [1.0], 0, 4).batch_at(1)
    assert [slot.epoch for slot in slots] == [0, 1, 1, 1]


def test_the_order_is_fixed_for_ever() -> None:
    """A changed order breaks every run that resumes: never change these numbers."""
    plan = Plan([10, 4], [3.0, 1.0], seed=1, batch=8)
    drawn = [(slot.set, slot.sample, slot.epoch) for slot in plan.batch_at(1)]
    assert drawn == [(0, 5, 0), (0, 8, 0), (1, 0, 0), (0, 6, 0), (0, 0, 0), (0, 8, 1), (1, 3, 0), (0, 5, 1)]
    assert [position for position in range(12) if is_mirrored(1, position)] == [2, 4, 5, 7, 10, 11]


def test_epochs_and_seeds_and_sets_are_shuffled_apart() -> None:
    places = np.arange(1000)
    orders = [shuffled(places, 1000, key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1))]
    for a, one in enumerate(orders):
        assert abs(np.corrcoef(one, places)[0, 1]) < 0.15
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.15
        for other in orders[a + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sets_are_shuffled_fairly(size: int) -> None:
    trials = 400
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), shuffled(np.arange(size), size, (seed, 0, 0))] += 1
    expected = trials / size
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_flips_are_a_fair_coin_that_depends_on_the_seed() -> None:
    coins = np.array([[is_mirrored(seed, position) for position in range(2000)] for seed in (1, 2)])
    assert np.abs(coins.mean(axis=1) - 0.5).max() < 0.05
    assert abs((coins[0] == coins[1]).mean() - 0.5) < 0.05


def test_crooked_ratios_are_met_within_one_ten_thousandth() -> None:
    weights = mix_weights([2**0.5, 1.0, 3.14159])
    assert sum(weights) <= MAX_PERIOD
    total = 2**0.5 + 1.0 + 3.14159
    for weight, ratio in zip(weights, [2**0.5, 1.0, 3.14159], strict=True):
        assert abs(weight / sum(weights) - ratio / total) <= 1.0 / MAX_PERIOD
    assert mix_weights([0.9, 0.1]) == (9, 1) and mix_weights([1, 1, 1]) == (1, 1, 1)


def test_epochs_at_counts_what_was_drawn() -> None:
    plan = Plan([10, 4], [3.0, 1.0], seed=1, batch=8)
    drawn = Counter(slot[0] for slot in stream(plan, 5))
    assert plan.epochs_at(5) == [drawn[0] / 10, drawn[1] / 4]


def test_a_resumed_plan_is_made_from_its_state() -> None:
    state = Plan([10, 4], [3.0, 1.0], seed=1, batch=8).state(17)
    n = state.pop("step")
    assert Plan(**state).batch_at(n) == Plan([10, 4], [3.0, 1.0], seed=1, batch=8).batch_at(17)


@pytest.mark.parametrize(
    ("sizes", "ratios", "batch", "said"),
    [
        ([], [], 1, "at least one set"),
        ([3], [1.0, 2.0], 1, "one ratio each"),
        ([3, 0], [1.0, 1.0], 1, "shard set 1 has no samples"),
        ([3], [1.0], 0, "batch 0"),
        ([3, 3], [1.0, 0.0], 1, "ratio 0 of shard set 1"),
        ([3, 3], [1.0, -1.0], 1, "ratio -1 of shard set 1"),
        ([3, 3], [1.0, 1e-5], 1, "at least 1/10000"),
        ([3, 3], [1.0, float("nan")], 1, "ratio nan"),
    ],
)
def test_plans_that_cannot_be_meant(sizes: list[int], ratios: list[float], batch: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Plan(sizes, ratios, 0, batch)


def test_a_batch_that_the_ranks_do_not_divide() -> None:
    with pytest.raises(UsageError, match="batch 10: must be a multiple of the 4 ranks; take 8 or 12"):
        rank_slots(range(10), 0, 4, 1)
    with pytest.raises(UsageError, match="micro_batch 0"):
        rank_slots(range(8), 0, 4, 0)


def test_evaluation_batches_cover_everything_once() -> None:
    assert [list(b) for b in consecutive_batches(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert consecutive_batches(0, 3) == []


SHARDS = [[7, 8, 7, 8, 5], [4, 4, 3]]
HEADS = [np.arange(35) * 5 % 7, np.arange(11) % 3]


def optioned(block_shards: int = 0, bucket_batches: int = 0, batch: int = 8) -> Plan:
    sizes = [sum(shards) for shards in SHARDS]
    return Plan(sizes, [3.0, 1.0], 5, batch, block_shards, SHARDS, bucket_batches, HEADS)


OPTIONS = [(2, 0), (0, 4), (2, 4), (1, 1)]


@pytest.mark.parametrize(("block_shards", "bucket_batches"), OPTIONS)
def test_options_keep_every_epoch_exact_and_every_batch_its_ratio(block_shards: int, bucket_batches: int) -> None:
    plain, plan = optioned(), optioned(block_shards, bucket_batches)
    batches = 72  # whole windows
    slots = stream(plan, batches)
    assert sorted(slot.position for slot in slots) == list(range(8 * batches))
    for set_, size in enumerate(plan.sizes):
        drawn = Counter((slot.epoch, slot.sample) for slot in slots if slot.set == set_)
        assert set(drawn.values()) == {1}
        whole = range(max(epoch for epoch, _ in drawn))
        assert all((epoch, sample) in drawn for epoch in whole for sample in range(size))
    for n in range(batches):
        assert [slot.set for slot in plan.batch_at(n)] == [slot.set for slot in plain.batch_at(n)]
    assert slots != stream(plain, batches)


@pytest.mark.parametrize(("block_shards", "bucket_batches"), OPTIONS)
def test_options_do_not_see_the_ranks(block_shards: int, bucket_batches: int) -> None:
    plan = optioned(block_shards, bucket_batches)
    for n in (0, 3, 17, 4):
        for size in (1, 2, 4, 8):
            parts = [plan.share_at(n, rank, size) for rank in range(size)]
            assert [slot for part in parts for slot in part] == plan.batch_at(n)
    assert optioned(block_shards, bucket_batches).batch_at(17) == plan.batch_at(17), "any batch can be asked for first"


def test_buckets_bring_alike_numbers_of_heads_together() -> None:
    def spread(plan: Plan) -> float:
        heads = [[HEADS[s.set][s.sample] for s in plan.batch_at(n) if s.set == 0] for n in range(40)]
        return float(np.mean([np.std(batch) for batch in heads]))

    assert spread(optioned(bucket_batches=8)) < 0.5 * spread(optioned())
    # Few heads do not always come first: the order of a window's batches is shuffled.
    first = [np.mean([HEADS[0][s.sample] for s in optioned(0, 8).batch_at(8 * w) if s.set == 0]) for w in range(12)]
    assert max(first) > 4.5 and min(first) < 1.5


def test_a_state_names_options_that_are_on() -> None:
    assert "block_shards" not in optioned().state(3)
    assert optioned(2, 4).state(3) == optioned().state(3) | {"block_shards": 2, "bucket_batches": 4}


def test_options_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="block_shards -1"):
        Plan([3], [1.0], 0, 1, block_shards=-1)
    with pytest.raises(UsageError, match="needs the sizes of all shards"):
        Plan([3], [1.0], 0, 1, block_shards=2)
    with pytest.raises(UsageError, match="needs the number of heads"):
        Plan([3], [1.0], 0, 1, bucket_batches=2, heads=[[1, 2]])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 5))
@settings(max_examples=30)
def test_shares_do_not_depend_on_what_was_asked_before(asked: list[tuple[int, int]], step: int) -> None:
    plan = optioned(block_shards=2)
    # Jumps of all kinds, then one reader's steady steps, which are worked out ahead.
    for n, rank in [*asked, *((n, 1) for n in range(3, 200, step))]:
        assert plan.share_at(n, rank, 4) == asked_first(n, rank)


@cache
def asked_first(n: int, rank: int) -> list[Slot]:
    """What a plan says that was asked nothing before."""
    return optioned(block_shards=2).share_at(n, rank, 4)
