"""The learning rate as a function of the step."""

import pytest

from cogvlm_hpe.train.schedule import learning_rate

SHAPE = {"peak": 2.0, "warmup_steps": 10, "max_steps": 110, "min_ratio": 0.1}


def test_warm_up_peak_and_end() -> None:
    assert learning_rate(0, **SHAPE) == pytest.approx(0.2)
    assert learning_rate(9, **SHAPE) == learning_rate(10, **SHAPE) == 2.0
    assert learning_rate(60, **SHAPE) == pytest.approx(1.1)
    assert learning_rate(110, **SHAPE) == learning_rate(500, **SHAPE) == pytest.approx(0.2)


def test_never_rises_after_warm_up() -> None:
    rates = [learning_rate(step, **SHAPE) for step in range(10, 120)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up() -> None:
    assert learning_rate(0, peak=1.0, warmup_steps=0, max_steps=10, min_ratio=0.0) == 1.0
