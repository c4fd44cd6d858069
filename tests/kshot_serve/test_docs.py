"""docs/serving.md and README do what they say: their commands run, their options and metrics exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from kshot_flows.cli.main import app
from kshot_serve.budgets import SPARE_FILES
from kshot_serve.server import workers
from kshot_serve.server.connections import _HEAD_BYTES, _QUEUED
from kshot_serve.settings import EngineSettings, Settings

Photo = Callable[..., bytes]
Running = Any  # of conftest.py

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "serving.md").read_text()
TESTED = Path(__file__).with_name("serving_sentences.txt")
README = (ROOT / "README.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


def sentences(text: str) -> Iterator[str]:
    """Sentences of paragraphs and list items, and rows of tables, each on one line; examples are left out."""
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.S)):
        if block.startswith("|"):
            yield from block.splitlines()[2:]
        elif not block.startswith("#"):
            for item in re.split(r"^- ", block, flags=re.M):
                yield from filter(None, re.split(r"(?<=[.!?])\s+(?=[A-Z`*(\[])", " ".join(item.split())))


def test_every_sentence_has_tests_that_exist(test_names: set[str]) -> None:
    """serving_sentences.txt has each one and, in the line below, its tests; or "advice" where it claims nothing."""
    lines = TESTED.read_text().splitlines()
    assert lines[0::2] == list(sentences(DOCS))
    for sentence, tests in zip(lines[0::2], lines[1::2], strict=True):
        assert set(tests.strip().split(", ")) <= test_names | {"advice"}, sentence


@pytest.fixture
def photos(tmp_path: Path, photo: Photo) -> Path:
    """A folder with the files that the examples name."""
    for name, colour in (("tom", "red"), ("kitty", "red"), ("rex", "blue"), ("mystery", "blue")):
        for kind in ("jpg", "png"):
            content = photo(colour, len(name), {"jpg": "JPEG", "png": "PNG"}[kind])
            (tmp_path / f"{name}.{kind}").write_bytes(content)
    return tmp_path


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("jq"), reason="the examples need curl and jq")
@pytest.mark.parametrize("text", [DOCS, README], ids=["serving.md", "README.md"])
def test_its_curl_commands_run(server: Running, photos: Path, text: str) -> None:
    lines = [
        line for block in blocks(text, "bash") for line in block.splitlines() if re.match(r"(space=\$\()?curl ", line)
    ]
    assert len(lines) >= 3
    script = "\n".join(["set -euo pipefail", *lines]).replace("curl -s", "curl -sf")
    script = script.replace("localhost:8000", server.url.removeprefix("http://")).replace('"pets"', f'"{photos.name}"')
    done = subprocess.run(["bash", "-c", script], cwd=photos, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]


def test_its_clients_run(server: Running, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    [client] = [block for block in blocks(README, "python") if "Client(" in block]
    more, triton = blocks(DOCS, "python")
    known: dict[str, Any] = {}
    for block in (more, client):
        exec(block.replace("http://127.0.0.1:8000", server.url), known)
    exec(
        triton.replace("localhost:8000", server.url.removeprefix("http://")).replace(
            "spc_01jd7x2m9v4k8r3t6w5y0zabcd", known["pets"].id
        ),
        known,
    )
    known["client"].close()
    assert [each["name"] for each in known["animals"].classes()] == ["tabby"]
    for space in ("pets", "animals"):
        known[space]._awaited._client._http.close()
    assert known["answer"].as_numpy("class").tolist() == [b"dog"]


def test_its_metrics_exist(server: Running) -> None:
    exposed = server.http.get("/metrics").text
    named = set(re.findall(r"`(kshot_\w+)", DOCS))
    assert len(named) > 10
    assert not [name for name in named if f"# TYPE {name} " not in exposed]


def test_its_limits_are_the_settings_defaults() -> None:
    settings = Settings(source="")
    engine, text = settings.engine, " ".join(DOCS.split())
    assert settings.share == 0.5
    assert settings.requests_per_s == 0
    for sentence in (
        f"A body must arrive within {settings.body_s:g} seconds",
        f"{engine.queue} images at work in a worker, of which one key may hold half",
        f"{engine.wait_s:g}: the longest wait for a request's photos",
        f"at most {engine.decode_mp} megapixels at once (`decode_mp`)",
        f"{settings.request_mp:,} megapixels (`request_mp`)",
        f"have { {5: 'five'}.get(engine.deadline_s) } seconds together",
        f"an import {settings.import_s:g} (`import_s`)",
        f"({settings.bodies_mb} MB in all; an announced length reserves nothing)",
        f"until they are read ({settings.answers_mb} MB)",
        f"requests under way ({settings.requests})",
        f"(`connections`) | {settings.connections}, or the system's limit of open files less {SPARE_FILES} |",
        "(`requests_per_s`) | none:",
        f"(`wrong_keys_per_s`) | {settings.wrong_keys_per_s:g}, and ten seconds' worth at once |",
        f"head of a request | {_HEAD_BYTES // 1000} kB, {settings.headers_s:g} seconds",
        f"requests sent ahead on one connection | {_QUEUED} |",
        f"(`unread_s`) | {settings.unread_s:g} seconds |",
        f"keeps {settings.reserve_mb} MB in reserve",
        f"for { {5: 'five'}.get(settings.stale_s / 60) } minutes at most",
    ):
        assert sentence in text, sentence


def test_its_limits_with_a_name_are_settings_without_an_option() -> None:
    [part] = re.findall(r"\n## Limits and refusals\n(.*?)\n## ", DOCS, re.S)
    named = set(re.findall(r"\(`(\w+)`\)", part)) - {"again"}  # a reason
    assert {"connections", "requests_per_s", "wrong_keys_per_s", "unread_s", "share"} <= named
    assert named <= Settings.model_fields.keys() | EngineSettings.model_fields.keys()
    command: Any = get_command(app)
    options = {option for parameter in command.commands["serve"].params for option in parameter.opts}
    assert not {f"--{name.replace('_', '-')}" for name in named} & options


def test_its_kshot_commands_and_their_options_exist() -> None:
    lines = [
        line for block in blocks(DOCS, "bash") for line in block.splitlines() if re.search(r"(^|\w )kshot \w", line)
    ]
    commands = [shlex.split(line[line.index("kshot ") :], comments=True)[1:] for line in lines if "docker" not in line]
    assert len(commands) >= 8
    for words in commands:
        found: Any = get_command(app)
        while words and words[0] in getattr(found, "commands", {}):
            found = found.commands[words.pop(0)]
        options = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words


def test_each_option_of_serve_is_in_its_help_and_becomes_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    given = shlex.split("""
        ./bundle --host 0.0.0.0 --port 80 --workers 2 --space ./fruit --space ./pets.zip --folder state
        --database sqlite:///x.db --photo-keys keys.db --device cuda --queue 64 --wait 3 --keep-photos no
        --strip-metadata --keys required --exposed --origin https://a.example --origin https://b.example
        --allow-host c.example --unpinned --accept 0.9
    """)
    options = {word for word in given if word.startswith("--")}
    command: Any = get_command(app)
    assert {option for each in command.commands["serve"].params for option in each.opts} == options | {"source"}
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert options <= set(re.findall(r"--[a-z-]+", shown))
    served: list[Settings] = []
    monkeypatch.setattr(workers, "serve", served.append)
    done = CliRunner().invoke(app, ["serve", *given])
    assert done.exit_code == 0, done.output
    assert served == [
        Settings(
            source="./bundle", host="0.0.0.0", port=80, workers=2, fill=(Path("fruit"), Path("pets.zip")),
            folder=Path("state"), database="sqlite:///x.db", photo_keys="keys.db",
            engine=EngineSettings(device="cuda", queue=64, wait_s=3), keep_photos=False, strip_metadata=True,
            keys="required", exposed=True, origins=("https://a.example", "https://b.example"), hosts=("c.example",),
            unpinned=True, accept=0.9,
        )
    ]  # fmt: skip


def test_its_settings_exist_and_all_have_units_and_are_taken_from_python(features_bundle: Path, tmp_path: Path) -> None:
    fields = Settings.model_fields | EngineSettings.model_fields
    named = set(re.findall(r"\(`(\w+)`\)", DOCS)) - {"gone", "again"}  # which are of answers
    assert len(named) > 5
    assert named <= fields.keys()
    for name, field in fields.items():
        if field.annotation in (int, float):
            assert name.endswith(("_s", "_mb", "_mp")) or field.description, name
    program = (
        "from kshot_serve.server.workers import serve; from kshot_serve.settings import Settings\n"
        f"if __name__ == '__main__': serve(Settings(source={str(features_bundle)!r}, port=0, photos=7, leave_s=0))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = process.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/v1/limits").json()["request"]["photos"] == 7
    finally:
        process.terminate()
        process.communicate(timeout=60)
