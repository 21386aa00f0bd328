"""Random walks over everything that a user does to a model, each step compared with an oracle.

A round is 300 walks: for each network some that compile it and many that do not, which take a twentieth of
the time. ``TAHF4_WALK_SEED`` in the environment is the seed of the first round, 0 by default; ``TAHF4_WALK_ROUNDS`` is
the number of rounds, 1 by default. A walk that fails is printed as the shortest list of steps that still fails, with
the command that repeats it.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from walk_machine import WALKS, Walk
from walk_networks import KINDS

FIRST = int(os.environ.get("TAHF4_WALK_SEED", "0"))
ROUNDS = int(os.environ.get("TAHF4_WALK_ROUNDS", "1"))
SHARES = [(kind, compiles) for compiles in (True, False) for kind in KINDS]
"""Parts of a round; the longest come first, so that workers end together."""


def test_a_round_is_300_walks():
    assert set(WALKS) == set(SHARES)
    assert sum(WALKS.values()) >= 300


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", SHARES, ids=lambda share: f"{share[0]}-{'compiled' if share[1] else 'eager'}")
@pytest.mark.parametrize("number", range(FIRST, FIRST + ROUNDS))
def test_walks_end_where_their_oracle_is(number, share):
    chosen = settings(
        max_examples=WALKS[share],
        stateful_step_count=8,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    walk = type("Walk", (Walk,), {"kind": share[0], "compiling": share[1]})
    try:
        run_state_machine_as_test(seed(len(SHARES) * number + SHARES.index(share))(walk), settings=chosen)
    except BaseException as error:
        error.add_note(f"make walk SEED={number} ROUNDS=1 repeats this walk.")
        raise
