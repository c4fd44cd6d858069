"""The registry's commands, as a user runs them."""

import re
from pathlib import Path

import pytest
import typer
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


def test_models_lists_versions_with_stage_accuracy_and_data(model: str) -> None:
    lines = say("models", model).splitlines()
    assert re.search(r"2 +None +95\.10 ± 0\.40 % +passed +ffffffffffff", "\n".join(lines))
    assert re.search(r"1 +Production +95\.10 ± 0\.40 %", "\n".join(lines))
    assert model in say("models")


def test_promote_history_rollback_and_trace_tell_what_happened(model: str) -> None:
    assert say("promote", model, "2", "production") == (
        f"{model}: version 2 is in production now; version 1 went to the archive.\n"
    )
    assert say("rollback", model, "--why", "worse on real photos") == (
        f"{model}: version 1 is in production now; version 2 went to the archive.\n"
    )
    told = say("history", model)
    assert re.search(r"2 +None +Production +1 +ann +passed the gate", told)
    assert re.search(r"1 +Archived +Production +2 +ann +worse on real photos \(rollback\)", told)
    told = say("trace", model, "2")
    assert re.search(r"sha256\.adapt\.onnx +[0-9a-f]{64}", told)
    assert "passed the gate" in told


def test_a_version_without_a_verdict_needs_force_and_a_reason(model: str) -> None:
    with pytest.raises(KshotError, match=r"never judged.*--force --why REASON"):
        say("promote", model, "1", "production")
    with pytest.raises(KshotError, match="add --why"):
        say("promote", model, "1", "production", "--force")
    assert "version 1 is in production" in say("promote", model, "1", "production", "--force", "--why", "demo")


def test_an_interrupted_move_is_shown_and_repaired(model: str) -> None:
    stores.client().set_registered_model_alias(model, "production", "2")
    told = say("models", model)
    assert "the alias production is at version 2, and the log says version 1" in told
    assert f"kshot models {model} --repair" in told
    assert "the log says" not in say("models", model, "--repair")


def test_a_reason_is_shown_as_it_was_written(model: str) -> None:
    say("promote", model, "2", "production", "--why", "see [/docs/x.md] and [#12]")
    for told in (say("history", model), say("trace", model, "2")):
        assert "see [/docs/x.md] and [#12]" in told
