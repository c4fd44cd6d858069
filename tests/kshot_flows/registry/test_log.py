"""What follows from a log of moves, for any log at all."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kshot_flows.registry.log import SINGLE, Log, Stage

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


SHOWN = st.fixed_dictionaries(
    {
        "stages": st.dictionaries(VERSIONS, st.sampled_from(Stage)),
        "aliases": st.dictionaries(st.sampled_from(["production", "staging", "canary"]), VERSIONS),
    }
)


@example(  # what left production for staging displaced a version there, not in production
    [
        {"version": version, "stage": stage, "who": "ann", "why": "because", "rollback": False}
        for version, stage in ((1, Stage.STAGING), (2, Stage.PRODUCTION), (2, Stage.STAGING))
    ],
    {"stages": {1: Stage.NONE}, "aliases": {"production": 1}},
    0,
)
@given(ENTRIES, SHOWN, st.integers(0, 20))
def test_what_was_adopted_is_not_foreign_again_and_serves_if_its_alias_was_set(
    entries: list[dict[str, Any]], shown: dict[str, Any], settled: int
) -> None:
    stages, settled = shown["stages"], min(settled, len(entries))
    aliases = {alias: version for alias, version in shown["aliases"].items() if version in stages}
    said = {read(entries[:position]).holder(Stage.PRODUCTION) for position in range(settled, len(entries) + 1)}
    log = read(entries)
    for number, (version, stage, how) in enumerate(log.foreign(stages, aliases, settled), start=len(entries) + 1):
        entry = {"id": f"found {number}", "version": version, "stage": stage, "who": "x", "why": how}
        log.add(number, START, {**entry, "found_after": len(entries)})
    assert all(entry.refused is None for entry in log.entries if entry.adopted)
    assert log.foreign(stages, aliases, settled) == []
    if (alias := aliases.get("production")) is not None and alias not in said:
        assert log.holder(Stage.PRODUCTION) == alias


@given(ENTRIES, st.integers(0, 20))
def test_nothing_that_the_log_said_since_it_was_settled_is_foreign(entries: list[dict[str, Any]], at: int) -> None:
    """Any state on the way from an entry that MLflow followed to the newest one is a move that was interrupted."""
    log, at = read(entries), min(at, len(entries))
    for position in range(at, len(entries) + 1):
        shown = read(entries[:position])
        stages = {version: shown.stage(version) for version in range(1, 5)}
        aliases = {one.lower(): holder for one in SINGLE if (holder := shown.holder(one)) is not None}
        assert log.foreign(stages, aliases, at) == []


NONE, STAGING, PRODUCTION, ARCHIVED = Stage
SERVES = [{"version": 1, "stage": PRODUCTION, "who": "ann", "why": "first"}]
WAITS = [*SERVES, {"version": 2, "stage": STAGING, "who": "ann", "why": "next"}]
P1, P1S2 = {"production": 1}, {"production": 1, "staging": 2}


@pytest.mark.parametrize(
    ("entries", "stages", "aliases", "found"),
    [
        (SERVES, [PRODUCTION, NONE], {"production": 2}, [(2, PRODUCTION)]),
        (SERVES, [ARCHIVED, PRODUCTION], P1, [(2, PRODUCTION)]),  # a transition that archives the version there
        (SERVES, [PRODUCTION, PRODUCTION], P1, [(2, PRODUCTION)]),  # and one that does not
        (SERVES, [PRODUCTION, NONE, PRODUCTION], {"production": 2}, [(2, PRODUCTION), (3, ARCHIVED)]),  # alias counts
        (SERVES, [PRODUCTION, NONE], {}, [(1, ARCHIVED)]),
        (SERVES, [STAGING, NONE], P1, [(1, STAGING)]),
        (SERVES, [PRODUCTION, NONE], {**P1, "staging": 1}, []),  # under both aliases it is in production
        (WAITS, [PRODUCTION, STAGING], {"production": 2, "staging": 1}, [(2, PRODUCTION), (1, STAGING)]),
        (WAITS, [PRODUCTION, STAGING], {"production": 2}, [(2, PRODUCTION)]),
        (WAITS, [PRODUCTION, ARCHIVED], P1S2, [(2, ARCHIVED)]),
        (WAITS, [PRODUCTION, STAGING], {**P1S2, "canary": 1}, []),
        ([], [NONE, STAGING], {"production": 1}, [(1, PRODUCTION), (2, STAGING)]),  # kshot never moved any
    ],
)
def test_moves_by_other_means_are_found_in_stages_and_aliases(
    entries: list[dict[str, Any]], stages: list[Stage], aliases: dict[str, int], found: list[tuple[int, Stage]]
) -> None:
    log = read(entries)
    shown = dict(enumerate(stages, start=1))
    assert [(version, stage) for version, stage, _ in log.foreign(shown, aliases, log.newest)] == found


def test_an_interrupted_move_and_a_foreign_one_are_told_apart() -> None:
    log = read([*SERVES, {"version": 2, "stage": PRODUCTION, "who": "ann", "why": "better"}])
    before = {1: PRODUCTION, 2: NONE, 3: NONE}
    assert log.foreign(before, {"production": 1}, settled=1) == []  # entry 2 is on its way
    assert log.foreign(before, {"production": 1}, settled=2) == [
        (1, PRODUCTION, "the alias production was set to it"),
        (2, NONE, "its stage was set to None"),
    ]
    assert log.foreign(before, {"production": 3}, settled=1) == [(3, PRODUCTION, "the alias production was set to it")]


def test_an_adopted_move_does_not_count_if_kshot_moved_something_after_it_was_found() -> None:
    found = {"version": 3, "stage": PRODUCTION, "who": "x", "why": "found", "found_after": 1}
    log = read([*SERVES, {"version": 2, "stage": PRODUCTION, "who": "ann", "why": "better"}, found])
    assert log.holder(PRODUCTION) == 2
    assert "overtaken by entry 2: version 2 was moved to Production by ann" in (log.entries[-1].refused or "")
