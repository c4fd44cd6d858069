"""What deploy/ names exists: paths, extras, options and variables of `kshot serve`; and what it promises of safety."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from kshot_flows.cli.main import app

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILES = [ROOT / "deploy" / name for name in ("Dockerfile", "Dockerfile.cuda")]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", dockerfile.read_text())
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and line[0] not in "# "]  # type: ignore[misc]


def serve_options() -> tuple[set[str], set[str]]:
    """The options of `kshot serve`, and the environment variables that stand for some."""
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    named = {option for parameter in serve.params for option in parameter.opts if option.startswith("--")}
    return named, {parameter.envvar for parameter in serve.params if parameter.envvar}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_made_of_what_is_there(dockerfile: Path) -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for kind, rest in instructions(dockerfile):
        if kind == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in sent
    [extras] = re.findall(r"(?:EXTRAS=|\.\[)([a-z]+(?:,[a-z]+)*)", dockerfile.read_text())
    assert set(extras.split(",")) <= EXTRAS.keys()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_kshot_as_nobody_in_particular_and_reports_nothing_home(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    last = dict(steps)
    assert last["USER"] == "kshot"
    assert [kind for kind, _ in steps].index("USER") < [kind for kind, _ in steps].index("CMD")
    environment = " ".join(rest for kind, rest in steps if kind == "ENV")
    assert {"DO_NOT_TRACK=true", "MLFLOW_DISABLE_TELEMETRY=true"} <= set(environment.split())
    if dockerfile.name == "Dockerfile":  # of which Prefect's is made
        assert "PREFECT_SERVER_ANALYTICS_ENABLED=false" in environment.split()
    command = yaml.safe_load(last["CMD"])
    assert {part for part in command if part.startswith("--")} <= serve_options()[0]


def test_the_image_for_gpus_never_serves_without_one() -> None:
    command = yaml.safe_load(dict(instructions(DOCKERFILES[1]))["CMD"])
    assert command[command.index("--device") + 1] == "cuda"


def test_the_server_is_started_as_its_command_line_has_it() -> None:
    server, (options, variables) = SERVICES["server"], serve_options()
    assert server["command"][0] == "serve"
    assert {part for part in server["command"] if part.startswith("--")} <= options
    assert {name for name in server["environment"] if name.startswith("KSHOT_")} <= variables
    assert int(server["stop_grace_period"].removesuffix("s")) > 25  # Settings.drain_s


def test_commands_in_its_head_exist() -> None:
    head = (ROOT / "deploy" / "compose.yaml").read_text().split("\nname:")[0]
    commands = get_command(app)
    for words in map(shlex.split, re.findall(r"(?:exec server kshot|run --rm train) ([^#\n]+)", head)):
        found: Any = commands
        while words and words[0] in getattr(found, "commands", {}):
            found = found.commands[words.pop(0)]
        assert found is not commands
        options = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_the_server_has_postgres_mlflow_and_prefect_beside_it() -> None:
    assert set(SERVICES) == {"server", "database", "mlflow", "prefect", "train"}
    assert SERVICES["database"]["image"].startswith("postgres:")
    assert [SERVICES[name]["entrypoint"][:2] for name in ("mlflow", "prefect")] == [
        ["mlflow", "server"],
        ["prefect", "server"],
    ]
    assert "@database/" in SERVICES["server"]["environment"]["KSHOT_DATABASE"]
    assert SERVICES["server"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_only_the_image_that_trains_holds_torch() -> None:
    def needs_torch(extras: str) -> bool:
        return any(need.startswith("torch") for extra in extras.split(",") for need in EXTRAS[extra])

    for dockerfile in DOCKERFILES:
        [extras] = re.findall(r"(?:EXTRAS=|\.\[)([a-z]+(?:,[a-z]+)*)", dockerfile.read_text())
        assert not needs_torch(extras)
    built = {name: service for name, service in SERVICES.items() if "build" in service}
    with_torch = {
        each["image"] for each in built.values() if needs_torch(each["build"].get("args", {}).get("EXTRAS", "registry"))
    }
    assert with_torch == {"kshot-train"}
    assert built["server"]["image"] == "kshot"


def test_secrets_come_from_the_environment() -> None:
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    assert "${POSTGRES_PASSWORD:?" in text
    assert not re.findall(r"(?i)(?:password|secret|token|key)\w*\s*:\s*[\"']?(?!\$\{)[\w-]{6,}", text)
    assert not re.findall(r"://\w+:(?!\$\{)[^@\s]+@", text)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_bound_to_this_host_and_its_file_system_is_read_only(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert not service.get("privileged")
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (ROOT / "deploy" / source).exists()
    for other in service.get("depends_on", {}):
        assert "healthcheck" in SERVICES[other]
    if "build" in service:
        assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert set(service["build"].get("args", {}).get("EXTRAS", "").split(",")) - {""} <= EXTRAS.keys()


def test_extras_that_the_documentation_names_exist() -> None:
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    named = {extra for text in texts for group in re.findall(r"kshot\[([\w,]+)\]", text) for extra in group.split(",")}
    assert {"client", "registry"} <= named <= EXTRAS.keys()
