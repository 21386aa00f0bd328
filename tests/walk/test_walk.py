"""Seeded random walks over everything that a user does to a model, each step compared with an oracle.

``TAHF4_WALKS`` in the environment is the number of walks, 300 by default; ``TAHF4_WALK_SEED`` is the first seed. Each
seed stands for 50 walks. A walk that fails is printed as the shortest list of steps that still fails, with the command
that repeats it.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from walk_machine import Walk

BATCH = 50
FIRST = int(os.environ.get("TAHF4_WALK_SEED", "0"))
COUNT = int(os.environ.get("TAHF4_WALKS", "300"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(FIRST, FIRST + -(-COUNT // BATCH)))
def test_walks_end_where_their_oracle_is(number):
    walks = min(BATCH, COUNT - (number - FIRST) * BATCH)
    chosen = settings(
        max_examples=walks,
        stateful_step_count=8,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    try:
        run_state_machine_as_test(seed(number)(Walk), settings=chosen)
    except BaseException as error:
        error.add_note(f"make walk SEED={number} COUNT={walks} repeats this walk.")
        raise
