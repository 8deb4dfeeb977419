"""Settings of all tests: one printed, settable seed; no network; few threads."""

from __future__ import annotations

import os
import random

import pytest

# Before anything imports transformers: unit tests never reach for the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def session_seed() -> int:
    """Return the seed of this session: TOPOPRUNE_SEED, a number (default 0) or "random"."""
    text = os.environ.get("TOPOPRUNE_SEED", "0")
    if text == "random":
        return random.SystemRandom().randrange(2**31)
    try:
        return int(text)
    except ValueError:
        raise pytest.UsageError(f"TOPOPRUNE_SEED must be a number or 'random', found {text!r}") from None


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Hypothesis reads this option in its own pytest_configure; xdist hands it on to the workers.
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = session_seed()


def pytest_report_header(config: pytest.Config) -> str:
    data = os.environ.get("TOPOPRUNE_DATA", "not set: tests on real data skip")
    return f"seed: {config.option.hypothesis_seed} (set TOPOPRUNE_SEED to change it)\nTOPOPRUNE_DATA: {data}"


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """The session's seed, for tests that draw their own random numbers."""
    return int(pytestconfig.option.hypothesis_seed)
