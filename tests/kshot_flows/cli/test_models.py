"""The registry's commands, as a user runs them."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from typer.testing import CliRunner

from kshot_flows import registry
from kshot_flows.cli import models
from kshot_flows.registry.gate import Check, GateReport
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError

app = typer.Typer()
models.add_commands(app)


@pytest.fixture
def model(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two versions; the second passed its gate against the first."""
    monkeypatch.setenv("COLUMNS", "160")
    name = f"cli-{tmp_path.name.strip('_')}".replace("_", "-")
    for content in "ab":
        bundle = tmp_path / content
        bundle.mkdir()
        for file in ("adapt.onnx", "classify.onnx", "bundle.json"):
            (bundle / file).write_text(content)
        with runs.run(name, recipe={}, data=runs.DataRef("toy", "f" * 64), seed=1) as run:
            registry.register(name, run.id, bundle, tags={"accuracy": "0.951", "margin": "0.004"})
    registry.move(name, 1, "production", why="first")
    check = Check("accuracy", True, 0.9, 0.8, "good enough")
    registry.record_gate(name, 2, GateReport(2, 1, 100, 0.9, 0.01, None, (check,)).to_dict())
    return name


def say(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def parsed(*arguments: str) -> Any:
    return json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)


def test_models_lists_versions_with_stage_accuracy_and_data(model: str) -> None:
    lines = say("models", model).splitlines()
    assert re.search(r"2 +None +95\.10 ± 0\.40 % +passed +ffffffffffff", "\n".join(lines))
    assert re.search(r"1 +Production +95\.10 ± 0\.40 %", "\n".join(lines))
    assert model in say("models")


def test_promote_history_rollback_and_trace_tell_what_happened(model: str) -> None:
    assert say("promote", model, "2", "production") == (
        f"{model}: version 2 is in production now; version 1 is archived.\n"
    )
    assert say("rollback", model, "--why", "worse on real photos") == (
        f"{model}: version 1 is in production now; version 2 is archived.\n"
    )
    told = say("history", model)
    assert re.search(r"2 +None +Production +1 +ann +passed the gate", told)
    assert re.search(r"1 +Archived +Production +2 +ann +worse on real photos \(rollback\)", told)
    told = say("trace", model, "2")
    assert re.search(r"sha256\.adapt\.onnx +[0-9a-f]{64}", told)
    assert "passed the gate" in told


def test_a_version_without_a_verdict_needs_force_and_a_reason(model: str) -> None:
    registry.move(model, 1, "archived", why="old")
    with pytest.raises(KshotError, match=r"never judged.*--force --why REASON"):
        say("promote", model, "1", "production")
    with pytest.raises(KshotError, match="add --why"):
        say("promote", model, "1", "production", "--force")
    assert "version 1 is in production" in say("promote", model, "1", "production", "--force", "--why", "demo")


def test_taking_the_champion_out_of_production_says_all_that_moved_and_what_serves_then(model: str) -> None:
    registry.move(model, 2, "staging", why="next")
    with pytest.raises(KshotError, match=r"version 1 of .* is in production, and without it nothing would be"):
        say("promote", model, "1", "staging")
    assert say("promote", model, "1", "staging", "--force", "--why", "broken") == (
        f"{model}: version 1 is in staging now and no longer in production; version 2 is archived. Nothing is in "
        "production: servers that run go on with the version that they have, new ones wait.\n"
    )
    assert say("promote", model, "1", "archived") == f"{model}: version 1 is archived now.\n"
    assert say("promote", model, "1", "archived") == f"{model}: version 1 is archived already; nothing was moved\n"
    assert say("promote", model, "1", "none") == f"{model}: version 1 is in no stage now.\n"


def test_a_move_made_in_mlflow_is_recorded_by_the_next_command_which_says_so(model: str) -> None:
    door = stores.client()
    door.set_registered_model_alias(model, "production", "2")
    door.set_registered_model_alias(model, "canary", "1")
    told = say("models", model)
    assert f"version 2 of {model} is in production now: the alias production was set to it; it was recorded" in told
    assert re.search(r"2 +Production +95.10", told)
    assert re.search(r"1 +Archived +95.10 .* canary", told)
    assert "it was recorded" not in say("models", model)
    assert re.search(r"2 +None +Production +1 +someone in MLflow +the alias production was set", say("history", model))


def test_where_the_registry_cannot_be_written_what_does_not_agree_is_said_and_the_rest_shown(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.client().set_registered_model_alias(model, "production", "2")

    def denied(*_: object) -> None:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    monkeypatch.setattr(MlflowClient, "set_registered_model_tag", denied)
    told = say("models", model)
    assert "the alias production is at version 2, and the log says version 1" in told
    assert f"MLflow did not take a move of {model}, or not all of it: Permission denied" in told
    assert re.search(r"1 +Production +95.10", told)
    with pytest.raises(registry.UnsettledError):
        say("rollback", model)


def test_json_has_stable_names_iso_times_and_nothing_else_on_standard_output(model: str) -> None:
    stores.client().set_registered_model_alias(model, "production", "2")
    second, first = parsed("models", model, "--json")
    assert first == {
        "name": model, "version": 1, "stage": "archived", "aliases": [], "registered": first["registered"],
        "accuracy": 0.951, "margin": 0.004, "gate": None, "gate_report": None, "warnings": "", "recipe": model,
        "data": "f" * 36, "data_sha256": "f" * 64, "other_data_sha256": None, "git_commit": None, "git_dirty": False,
        "mlflow_run": first["mlflow_run"], "prefect_run": None, "source": first["source"], "sha256": first["sha256"],
    }  # fmt: skip
    assert (second["stage"], second["aliases"], second["gate"]) == ("production", ["production"], "passed")
    assert sorted(first["sha256"]) == ["adapt.onnx", "bundle.json", "classify.onnx"]
    assert datetime.fromisoformat(first["registered"]).tzinfo
    moves = parsed("history", model, "--json")
    assert moves[1] == {
        "number": 2, "when": moves[1]["when"], "version": 2, "from": "none", "to": "production", "archived": 1,
        "who": "someone in MLflow", "why": "the alias production was set to it", "gate_report": None,
        "rollback": False, "adopted": True, "refused": None,
    }  # fmt: skip
    assert parsed("trace", model, "2", "--json") == {**second, "history": moves[1:]}
    assert model in {version["name"] for version in parsed("models", "--json")}


def test_a_reason_is_shown_as_it_was_written(model: str) -> None:
    say("promote", model, "2", "production", "--why", "see [/docs/x.md] and [#12]")
    for told in (say("history", model), say("trace", model, "2")):
        assert "see [/docs/x.md] and [#12]" in told
