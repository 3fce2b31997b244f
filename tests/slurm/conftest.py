"""One private Slurm for all tests of the batch scripts."""

import os
from collections.abc import Iterator

import pytest
from private_slurm import Slurm, missing_programs, private_slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two idle nodes."""
    if os.geteuid() != 0 or missing_programs():
        pytest.skip("a private Slurm needs root, slurmctld, slurmd and munge; make test-slurm sees to it")
    with private_slurm() as running:
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have measured."""
    for report in terminalreporter.getreports("passed"):
        for what, said in report.user_properties:
            terminalreporter.write_line(f"{what}: {said}")
