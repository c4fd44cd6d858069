"""docs/serving.md and README do what they say: their commands run, their options and metrics exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from kshot_flows.cli.main import app

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
    """serving_sentences.txt has each sentence and, indented below it, its tests, or "advice" where it claims nothing."""
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
