"""Settings of the whole suite: one thread a worker, no network, deterministic, a share of the matrix a day."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import hypothesis
import pytest
import torch

from tests.support import shares
from tests.support.hub import hub as hub

torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("suite")

collect_ignore = ["third_party"]
"""A package of somebody else's, which is found when a test puts it on the path."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share-seed", help="which share of the matrix runs: a number, by default that of the day, or all"
    )


def pytest_configure(config: pytest.Config) -> None:
    named = any("::" in arg and "[" in arg for arg in config.args)  # whoever names a cell gets it on any day
    try:
        shares.settle(shares.ALL if named else config.getoption("--share-seed"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_finish() -> None:
    """What the libraries hold from their import is there to stay: looking through it took a sixth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries complain at exit of objects that nobody has freed


def _share() -> str:
    seed = os.environ[shares.VARIABLE]
    return f"share of the matrix: --share-seed {seed}" + (
        "" if seed == shares.ALL else "; make test-all runs all of it"
    )


def pytest_report_header() -> str:
    return _share()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.verbosity < 0:  # which hides the header
        terminalreporter.write_line(_share())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
