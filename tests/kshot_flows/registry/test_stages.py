"""What follows from a log of moves, for any log at all."""

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kshot_flows.registry.stages import SINGLE, Log, Stage

START = datetime(2026, 1, 1, tzinfo=UTC)
VERSIONS = st.integers(1, 4)

ENTRIES = st.lists(
    st.builds(
        lambda version, stage, condition, rollback: {
            "version": version,
            "stage": stage,
            "who": "ann",
            "why": "because",
            "rollback": rollback and stage is Stage.PRODUCTION,
            **(condition if stage in SINGLE else {}),
        },
        VERSIONS,
        st.sampled_from(Stage),
        st.one_of(st.just({}), st.builds(lambda seen: {"expect": seen}, st.none() | VERSIONS)),
        st.booleans(),
    ),
    max_size=20,
)


def read(entries: list[dict[str, Any]]) -> Log:
    log = Log("toy")
    for number, entry in enumerate(entries, start=1):
        log.add(number, START + timedelta(seconds=number), {"id": str(number), **entry})
    return log


@given(ENTRIES)
def test_staging_and_production_never_hold_two(entries: list[dict[str, Any]]) -> None:
    stages = list(read(entries).stages.values())
    assert all(stages.count(stage) <= 1 for stage in SINGLE)


@given(ENTRIES)
def test_an_entry_counts_just_when_its_expectation_holds_where_it_stands(entries: list[dict[str, Any]]) -> None:
    for position, entry in enumerate(entries):
        before, after = read(entries[:position]), read(entries[: position + 1])
        holds = "expect" not in entry or before.holder(entry["stage"]) == entry["expect"]
        assert (after.entries[-1].refused is None) == holds
        assert after.stages.get(entry["version"]) == (entry["stage"] if holds else before.stages.get(entry["version"]))
        if not holds:
            assert (after.stages, after.served) == (before.stages, before.served)


@given(ENTRIES)
def test_an_entry_sent_twice_counts_once(entries: list[dict[str, Any]]) -> None:
    once, twice = read(entries), Log("toy")
    for number, entry in enumerate(entries, start=1):
        for copy in (0, 1):
            twice.add(2 * number + copy, START, {"id": str(number), **entry})
    assert (twice.stages, twice.served, len(twice.entries)) == (once.stages, once.served, len(once.entries))


@given(ENTRIES)
def test_the_champion_is_the_last_that_served(entries: list[dict[str, Any]]) -> None:
    log = read(entries)
    champion = log.holder(Stage.PRODUCTION)
    assert champion is None or log.served[-1] == champion


def test_a_version_that_kshot_never_moved_keeps_its_stage_until_that_is_taken() -> None:
    log = read([{"version": 1, "stage": Stage.PRODUCTION, "who": "ann", "why": "first"}])
    found = {1: Stage.NONE, 2: Stage.PRODUCTION, 3: Stage.STAGING, 4: Stage.NONE}
    assert log.wanted(found) == {1: Stage.PRODUCTION, 2: Stage.ARCHIVED, 3: Stage.STAGING, 4: Stage.NONE}
