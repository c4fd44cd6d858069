"""Stages, compare-and-set, audit, rollback and trace, on a real SQLite store."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psycopg
import pytest
from mlflow.exceptions import MlflowException

from kshot_flows import registry
from kshot_flows.registry.gate import Check, GateReport
from kshot_flows.registry.log import AlreadyThereError, GateClosedError, Stage, StageConflictError
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError

DATA = runs.DataRef("toy", "f" * 64, "0" * 32 + ".dir", "drawn")


def write_bundle(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    for file in ("adapt.onnx", "classify.onnx", "bundle.json"):
        (folder / file).write_text(f"{file} {content}")
    return folder


def register(name: str, folder: Path, content: str, run_id: str | None = None, **tags: str) -> int:
    if run_id is None:
        with runs.run(name, recipe={}, data=DATA, seed=1) as run:
            run_id = run.id
    return registry.register(name, run_id, write_bundle(folder / f"made-{content}", content), tags=tags)


@pytest.fixture
def model(project: Path, tmp_path: Path) -> str:
    """A model with three versions."""
    name = f"toy-{uuid.uuid4().hex[:8]}"
    for content in "abc":
        register(name, tmp_path, content)
    return name


def stages(name: str) -> dict[int, str]:
    return {version.version: str(version.stage) for version in registry.versions(name)}


def aliases(name: str) -> dict[str, int]:
    return {alias: version.version for version in registry.versions(name) for alias in version.aliases}


def report(passed: bool, champion: int | None) -> dict:
    check = Check("accuracy", passed, 0.9, 0.8, "90 % of the queries were right; at least 80 % are asked for")
    return GateReport(None, champion, 100, 0.9, 0.01, None, (check,)).to_dict()


def test_a_version_carries_its_hashes_its_data_and_its_code(project: Path, tmp_path: Path) -> None:
    code = {"mlflow.source.git.commit": "abc"}
    with runs.run("carries", recipe={"lr": 0.1}, data=DATA, seed=1, tags=code) as run:
        version = register("carries", tmp_path, "a", run.id, accuracy="0.95", margin="0.01")
    tags = registry.versions("carries")[0].tags
    assert version == 1
    assert tags["data"] == DATA.md5
    assert tags["commit"] == "abc"
    assert tags["accuracy"] == "0.95"
    assert len(tags["sha256.adapt.onnx"]) == len(tags["sha256.classify.onnx"]) == 64
    assert tags["stage"] == "None"


def test_registering_a_bundle_again_is_the_same_version_and_another_bundle_of_the_run_a_new_one(
    project: Path, tmp_path: Path
) -> None:
    with runs.run("again", recipe={}, data=DATA, seed=1) as run:
        first = register("again", tmp_path / "1", "a", run.id)
        assert register("again", tmp_path / "2", "a", run.id) == first
        assert register("again", tmp_path / "3", "b", run.id) == first + 1
    fetched = registry.fetch_bundle("again", first, tmp_path / "fetched")
    assert (fetched / "adapt.onnx").read_text() == "adapt.onnx a"


def test_a_folder_that_is_no_bundle_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(KshotError, match=r"lacks adapt\.onnx, classify\.onnx, bundle\.json\. `kshot run`"):
        registry.register("toy", "0" * 32, tmp_path)


@pytest.mark.parametrize("name", ["a/b", "a:b", "", "toy.moves", "it's", ".hidden"])
def test_a_name_that_mlflow_or_the_log_cannot_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(KshotError, match="cannot name a model"):
        registry.register(name, "0" * 32, tmp_path)


def test_a_move_shows_in_stage_tag_and_alias_and_archives_who_was_there(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    audit = registry.move(model, 2, Stage.PRODUCTION, why="better", who="bob")
    assert stages(model) == {1: "Archived", 2: "Production", 3: "None"}
    assert {v.version: v.tags["stage"] for v in registry.versions(model)} == stages(model)
    assert aliases(model) == {"production": 2}
    assert (audit.version, audit.displaced, audit.who, audit.why) == (2, 1, "bob", "better")
    assert registry.champion(model) == 2
    assert registry.disagreements(model) == []


def test_a_champion_that_is_archived_leaves_no_alias_behind(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    registry.move(model, 1, "archived", why="broken")
    assert registry.champion(model) is None
    assert aliases(model) == {}


def test_staging_and_production_hold_one_version_each(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    registry.move(model, 2, "staging", why="candidate")
    assert aliases(model) == {"production": 1, "staging": 2}
    registry.move(model, 2, "production", why="good", expect=1)
    assert aliases(model) == {"production": 2}


def test_history_only_grows_and_says_who_when_why_from_and_to(model: str) -> None:
    before = []
    for version, stage in [(1, "staging"), (1, "production"), (2, "production"), (1, "none")]:
        registry.move(model, version, stage, why=f"{version} to {stage}")
        after = registry.history(model)
        assert after[: len(before)] == before
        assert len(after) == len(before) + 1
        before = after
    assert [(a.version, str(a.came_from), str(a.stage), a.displaced) for a in before] == [
        (1, "None", "Staging", None),
        (1, "Staging", "Production", None),
        (2, "None", "Production", 1),
        (1, "Archived", "None", None),
    ]
    assert registry.disagreements(model) == []
    assert all(a.who == "ann" and a.why and a.when.tzinfo for a in before)
    assert [a.when for a in before] == sorted(a.when for a in before)


def test_an_outdated_expectation_moves_nothing_and_names_who_was_faster(model: str) -> None:
    registry.move(model, 1, "production", why="first", expect=None)
    registry.move(model, 2, "production", why="better", who="bob", expect=1)
    late = r"version 1 was expected in Production .* version 2 is there.*by bob.*better"
    with pytest.raises(StageConflictError, match=late):
        registry.move(model, 3, "production", why="too late", expect=1)
    with pytest.raises(StageConflictError, match="no version was expected"):
        registry.move(model, 3, "production", why="too late", expect=None)
    assert registry.champion(model) == 2
    assert len(registry.history(model)) == 2


def test_rolling_back_walks_back_through_what_served(model: str) -> None:
    for version in (1, 2, 3):
        registry.move(model, version, "production", why="new")
    audit = registry.rollback(model, why="worse on real photos")
    assert (audit.version, audit.displaced, audit.rollback) == (2, 3, True)
    assert registry.rollback(model, why="this too").version == 1
    assert stages(model) == {1: "Production", 2: "Archived", 3: "Archived"}
    with pytest.raises(KshotError, match="served before version 1, so there is none to go back to"):
        registry.rollback(model, why="and again")
    registry.move(model, 3, "production", why="mended")
    assert registry.rollback(model, why="no").version == 1


def test_rolling_back_never_reinstates_what_was_just_withdrawn(model: str) -> None:
    with pytest.raises(KshotError, match=r"no version of .* served before any other"):
        registry.rollback(model, why="too early")
    for version in (1, 2, 3):
        registry.move(model, version, "production", why="new")
    registry.move(model, 3, "archived", why="it sees ghosts")
    assert registry.rollback(model, why="back to what worked").version == 2
    assert stages(model) == {1: "Archived", 2: "Production", 3: "Archived"}


def test_rolling_back_skips_a_version_that_was_deleted(model: str) -> None:
    for version in (1, 2, 3):
        registry.move(model, version, "production", why="new")
    stores.client().delete_model_version(model, "2")
    assert registry.rollback(model, why="worse").version == 1


def test_a_deleted_champion_frees_its_place(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    registry.move(model, 1, "production", why="once more")
    stores.client().delete_model_version(model, "1")
    assert registry.champion(model) is None
    registry.move(model, 2, "production", why="next", expect=None)
    assert [a.why for a in registry.history(model)][-2:] == ["the version was deleted from the registry", "next"]


def test_a_failed_gate_lets_nothing_into_production_but_by_force_with_a_reason(model: str) -> None:
    with pytest.raises(GateClosedError, match="never judged"):
        registry.promote(model, 1, "production")
    registry.record_gate(model, 1, report(False, None))
    with pytest.raises(GateClosedError, match="did not pass its gate: 90 %"):
        registry.promote(model, 1, "production")
    with pytest.raises(KshotError, match="needs a reason"):
        registry.promote(model, 1, "production", force=True)
    audit = registry.promote(model, 1, "production", force=True, why="demo")
    assert audit.why == "demo (forced)"
    assert audit.report.startswith("runs:/")
    assert registry.promote(model, 2, "staging").stage is Stage.STAGING  # no gate before staging


def test_a_gate_report_counts_only_against_the_champion_it_judged(model: str) -> None:
    registry.record_gate(model, 1, report(True, None))
    registry.record_gate(model, 2, report(True, None))
    registry.promote(model, 1, "production")
    with pytest.raises(StageConflictError, match="verdict was on no version; judge again"):
        registry.promote(model, 2, "production")
    registry.record_gate(model, 2, report(True, 1))
    assert registry.promote(model, 2, "production").displaced == 1


def click(model: str, version: int, stage: str) -> None:
    """As a click in MLflow's pages."""
    with pytest.warns(FutureWarning):
        stores.client().transition_model_version_stage(model, str(version), stage)


def test_moves_made_in_mlflow_are_recorded_in_the_audit_and_stay(model: str) -> None:
    door = stores.client()
    registry.move(model, 1, "production", why="first")
    door.set_registered_model_alias(model, "production", "2")
    assert registry.disagreements(model) == ["the alias production is at version 2, and the log says version 1"]
    assert registry.settle(model) == [
        f"version 2 of {model} is in production now: the alias production was set to it; it was recorded"
    ]
    assert (stages(model), aliases(model)) == ({1: "Archived", 2: "Production", 3: "None"}, {"production": 2})
    click(model, 3, "Staging")
    click(model, 2, "Archived")
    registry.move(model, 1, "production", why="back", expect=None)  # a move records them first
    assert (stages(model), aliases(model)) == (
        {1: "Production", 2: "Archived", 3: "Staging"},
        {"production": 1, "staging": 3},
    )
    assert [(a.version, str(a.came_from), str(a.stage), a.displaced, a.adopted) for a in registry.history(model)] == [
        (1, "None", "Production", None, False),
        (2, "None", "Production", 1, True),
        (3, "None", "Staging", None, True),
        (2, "Production", "Archived", None, True),
        (1, "Archived", "Production", None, False),
    ]
    assert registry.history(model)[1].who == "someone in MLflow"
    assert (registry.disagreements(model), registry.settle(model)) == ([], [])


def test_of_a_stage_and_an_alias_set_to_different_versions_the_alias_counts(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    click(model, 3, "Production")
    stores.client().set_registered_model_alias(model, "production", "2")
    assert len(registry.settle(model)) == 2
    assert (stages(model), aliases(model)) == ({1: "Archived", 2: "Production", 3: "Archived"}, {"production": 2})
    stores.client().delete_registered_model_alias(model, "production")
    assert "the alias production was removed" in registry.settle(model)[0]
    assert (stages(model)[2], registry.champion(model), registry.disagreements(model)) == ("Archived", None, [])


def test_a_log_that_was_deleted_begins_again_with_what_mlflow_shows(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    registry.move(model, 2, "production", why="better")
    stores.client().delete_registered_model(f"{model}.moves")
    assert len(registry.settle(model)) == 2
    assert (stages(model), aliases(model)) == ({1: "Archived", 2: "Production", 3: "None"}, {"production": 2})
    assert (registry.champion(model), registry.disagreements(model)) == (2, [])


def test_models_of_other_programs_are_left_alone(project: Path) -> None:
    door, name = stores.client(), f"others-{uuid.uuid4().hex[:8]}"
    door.create_registered_model(name)
    door.create_model_version(name, source="somewhere", await_creation_for=0)
    door.set_registered_model_alias(name, "production", "1")
    assert (registry.settle(name), registry.disagreements(name)) == ([], [])
    assert aliases(name) == {"production": 1}
    with pytest.raises(MlflowException, match="not found"):
        door.get_registered_model(f"{name}.moves")


def test_the_champion_leaves_production_only_by_force_with_a_reason(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    registry.move(model, 2, "production", why="better")
    for stage in ("staging", "archived", "none"):
        with pytest.raises(GateClosedError, match=rf"nothing would be: .*promote {model} 2 {stage} --force --why"):
            registry.promote(model, 2, stage, why="no")
    assert registry.champion(model) == 2
    assert registry.promote(model, 2, "staging", why="broken", force=True).why == "broken (forced)"
    assert (aliases(model), registry.champion(model)) == ({"staging": 2}, None)
    with pytest.raises(AlreadyThereError, match="version 2 is in staging already; nothing was moved"):
        registry.promote(model, 2, "staging")
    assert registry.rollback(model, why="back").version == 1


def test_a_log_of_an_earlier_kshot_without_marks_is_followed_once(model: str) -> None:
    """It said "in production" where a killed process had not set the alias."""
    registry.move(model, 1, "production", why="first")
    door = stores.client()
    door.delete_registered_model_tag(model, "kshot.marks")
    door.delete_registered_model_alias(model, "production")
    assert registry.settle(model) == [
        f"{model}: the alias production is at no version, and the log says version 1; it was put right"
    ]
    assert aliases(model) == {"production": 1}
    door.delete_registered_model_alias(model, "production")
    assert "the alias production was removed" in registry.settle(model)[0]


def test_a_move_that_was_killed_is_finished_and_one_made_in_mlflow_beside_it_recorded(model: str) -> None:
    registry.move(model, 1, "production", why="first")
    script = f"""
import os, signal, mlflow
real = mlflow.MlflowClient.transition_model_version_stage
def once(*args, **kwargs):
    real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
mlflow.MlflowClient.transition_model_version_stage = once
from kshot_flows import registry
registry.move({model!r}, 2, "production", why="killed meanwhile")
"""
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert registry.champion(model) == 2  # the log had it already
    assert any("alias production is at version 1" in line for line in registry.disagreements(model))
    click(model, 3, "Archived")
    registry.move(model, 3, "staging", why="something else")
    assert registry.disagreements(model) == []
    assert aliases(model) == {"production": 2, "staging": 3}
    assert stages(model)[1] == "Archived"
    assert [(a.version, a.stage, a.adopted) for a in registry.history(model)[1:]] == [
        (2, "Production", False), (3, "Archived", True), (3, "Staging", False),
    ]  # fmt: skip


RACE = """
import os, sys
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
from kshot_flows import registry

ready, go = os.pipe()
for version in sys.argv[1:]:
    if not os.fork():
        version = int(version)
        registry.champion(model)  # connects
        os.close(go), os.read(ready, 1)  # until the parent closes its end
        {work}
        os._exit(0)
os.close(go)
sys.exit(any(os.wait()[1] for version in sys.argv[1:]))
"""


def race(model: str, versions: range, work: str) -> list[list[int]]:
    """Let processes of one moment each do the same for a version of its own; what they print."""
    script = RACE.replace("{work}", work.strip().replace("\n", "\n        ")).replace("(model", f"({model!r}")
    command = [sys.executable, "-c", script, *map(str, versions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


def test_of_several_processes_exactly_one_wins_and_the_others_are_told(model: str) -> None:
    rounds = 4
    counts = race(
        model,
        range(1, 4),
        f"""
won = lost = 0
for _ in range({rounds}):
    try:
        registry.move(model, version, "production", why="race", expect=registry.champion(model))
        won += 1
    except registry.StageConflictError as error:
        assert "was expected in Production" in str(error)
        lost += 1
os.write(1, f"{{won}} {{lost}}\\n".encode())
""",
    )
    moves = registry.history(model)
    assert sum(won for won, _ in counts) == len(moves)
    assert sum(won + lost for won, lost in counts) == 3 * rounds
    for before, after in itertools.pairwise(moves):  # each winner replaced the very version it had seen
        assert after.displaced in (before.version, None)
        assert (after.displaced or after.version) == before.version
    champion = registry.champion(model)
    assert [version for version, stage in stages(model).items() if stage == "Production"] == [champion]
    assert aliases(model) == {"production": champion}
    assert registry.disagreements(model) == []


def test_of_four_that_promote_at_once_on_postgres_one_wins(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE mlflow")
    address = postgres.replace("@/postgres?", "@/mlflow?")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for content in "abcde":
        version = register("raced", tmp_path, content)
        registry.record_gate("raced", version, report(True, None if content == "a" else 1))
    registry.promote("raced", 1, "production")
    outcome = race(
        "raced",
        range(2, 6),
        """
try:
    registry.promote(model, version, "production")
    os.write(1, f"{version}\\n".encode())
except registry.StageConflictError as error:
    assert "version 1 was expected in Production" in str(error)
""",
    )
    [[winner]] = outcome
    assert [(entry.version, entry.displaced) for entry in registry.history("raced")] == [(1, None), (winner, 1)]
    assert aliases("raced") == {"production": winner}
    assert (registry.disagreements("raced"), registry.settle("raced")) == ([], [])


def test_a_trace_leads_from_the_version_to_data_code_recipe_runs_and_moves(project: Path, tmp_path: Path) -> None:
    marks = {"mlflow.source.git.commit": "c0ffee", "kshot.git.dirty": "true", "kshot.prefect.flow_run": "flow-7"}
    with runs.run("traced", recipe={"lr": 0.1}, data=DATA, seed=1, tags=marks) as run:
        version = register("traced", tmp_path, "a", run.id, accuracy="0.951", margin="0.004")
    registry.record_gate("traced", version, report(True, None))
    registry.move("traced", version, "production", why="first")
    trace = registry.trace("traced", version)
    assert trace.facts["data (DVC)"] == DATA.md5
    assert trace.facts["git commit"] == "c0ffee + changes (git.diff)"
    assert trace.facts["Prefect run"] == "flow-7"
    assert trace.facts["MLflow run"] == run.id
    assert trace.facts["recipe"].startswith("traced")
    assert trace.facts["accuracy"] == "95.10 ± 0.40 %"
    assert trace.facts["gate"].startswith("passed runs:/")
    assert len(trace.facts["sha256.adapt.onnx"]) == 64
    assert [entry.stage for entry in trace.history] == [Stage.PRODUCTION]


def test_a_fetched_bundle_is_the_registered_one_or_an_error(model: str, tmp_path: Path) -> None:
    registry.move(model, 2, "production", why="first")
    fetched = registry.fetch_bundle(model, "production", tmp_path / "fetched")
    assert (fetched / "classify.onnx").read_text() == "classify.onnx b"
    assert registry.fetch_bundle(model, 2, fetched) == fetched  # there already
    with pytest.raises(KshotError, match="holds something else"):
        registry.fetch_bundle(model, 1, fetched)
    source = Path(stores.client().get_model_version(model, "3").source)
    (source / "adapt.onnx").write_text("tampered")
    with pytest.raises(KshotError, match=r"adapt\.onnx changed"):
        registry.fetch_bundle(model, 3, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_project_that_was_moved_keeps_its_bundles_reports_and_moves(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    (before / "mlflow").mkdir(parents=True)
    shutil.copy(shared_store / "mlflow" / "mlflow.db", before / "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KSHOT_HOME", str(before))
    register("moved", tmp_path, "a")
    registry.record_gate("moved", 1, report(True, None))
    before.rename(after)
    monkeypatch.setenv("KSHOT_HOME", str(after))
    assert registry.gate_report("moved", 1).passed
    registry.promote("moved", 1, "production")
    registry.record_gate("moved", register("moved", tmp_path, "b"), report(True, 1))
    assert registry.promote("moved", 2, "production").displaced == 1
    assert (registry.fetch_bundle("moved", 1, tmp_path / "got") / "adapt.onnx").read_text() == "adapt.onnx a"
    assert not before.exists()


def test_mistakes_are_told_with_what_there_is(model: str) -> None:
    with pytest.raises(KshotError, match="has no version 9; it has: 1, 2, 3"):
        registry.move(model, 9, "staging", why="x")
    with pytest.raises(KshotError, match=f"no model 'nosuch' in the registry; there are: .*{model}"):
        registry.move("nosuch", 1, "staging", why="x")
    with pytest.raises(KshotError, match="no stage 'canary'; there are none, staging, production, archived"):
        registry.move(model, 1, "canary", why="x")
    with pytest.raises(KshotError, match="say why"):
        registry.move(model, 1, "staging", why=" ")
    with pytest.raises(KshotError, match="no alias 'live'"):
        registry.fetch_bundle(model, "live", Path("nowhere"))
    with pytest.raises(KshotError, match="no model"):
        registry.history(model + ".moves")


def test_the_logs_are_not_models(model: str) -> None:
    registry.move(model, 1, "staging", why="x")
    assert model in registry.models()
    assert model + ".moves" not in registry.models()


def test_the_pages_of_a_log_say_that_it_is_no_model(model: str) -> None:
    registry.move(model, 1, "staging", why="x")
    door, log = stores.client(), f"{model}.moves"
    door.update_registered_model(log, "as an earlier kshot described it")
    registry.move(model, 1, "archived", why="y")
    assert door.get_registered_model(log).description.startswith(f"This is no model: it is the audit log of {model}")
    assert door.get_model_version(log, "1").description == (
        f"No model, but an entry of the audit log of {model}: version 1 to Staging by ann: x"
    )
