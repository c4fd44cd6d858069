"""`kshot serve` as it is typed: each option becomes a setting, and without any the settings are the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kshot_flows.cli import main
from kshot_serve.server import workers
from kshot_serve.settings import EngineSettings, Settings


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["--host", "0.0.0.0", "--exposed"], {"host": "0.0.0.0", "exposed": True}),
        (["--keys", "required"], {"keys": "required"}),
        (["--queue", "7", "--wait", "0.5"], {"engine": EngineSettings(queue=7, wait_s=0.5)}),
        (
            ["--folder", "here", "--database", "postgresql://host/name"],
            {"folder": Path("here"), "database": "postgresql://host/name"},
        ),
    ],
)
def test_options_become_settings(options: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(workers, "serve", served.append)
    monkeypatch.delenv("KSHOT_DATABASE", raising=False)
    monkeypatch.delenv("KSHOT_PHOTO_KEYS", raising=False)
    done = CliRunner().invoke(main.app, ["serve", "bundle", *options])
    assert done.exit_code == 0, done.output
    assert served == [Settings(source="bundle", **expected)]
