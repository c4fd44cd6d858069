"""A client that openapi-python-client makes of the API's description: it works, downloads and photos included.

Skipped where that tool is missing. It does not install beside this project's other tools: pipx install it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GENERATOR = shutil.which("openapi-python-client")
DOCS = Path(__file__).parents[3] / "docs" / "serving.md"
TRIED = """
import sys
from io import BytesIO
from pathlib import Path
from kshot_generated import Client
from kshot_generated.api.classes import add_class, get_photo, list_classes
from kshot_generated.api.label_spaces import create_space, export_space, import_space
from kshot_generated.api.questions import classify
from kshot_generated.models import AddClassBody, NewSpace
from kshot_generated.types import File

def file(name):
    return File(BytesIO(Path(name).read_bytes()), name, "image/png")

client = Client(sys.argv[1], raise_on_unexpected_status=True)
space = create_space.sync(client=client, body=NewSpace(name="generated")).id
for name in ("red", "blue"):
    add_class.sync(space, client=client, body=AddClassBody(name=name, photos=[file(name + ".png")]))
[red, blue] = list_classes.sync(space, client=client).classes
assert get_photo.sync(space, red.photos[0].id, client=client).payload.read() == Path("red.png").read_bytes()
exported = export_space.sync(space, client=client).payload.read()
assert import_space.sync(client=client, body=File(BytesIO(exported))).classes == 2
print(classify.sync(space, client=client, body=file("red.png")).results[0].class_.name)
"""


@pytest.mark.skipif(GENERATOR is None, reason="openapi-python-client is not installed")
def test_a_generated_client_adds_classifies_and_downloads(
    server: Any, photo: Callable[..., bytes], tmp_path: Path
) -> None:
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(photo(colour))
    [config] = re.findall(r"```yaml\n(package_name_override.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "client.yaml").write_text(config)
    command = [
        GENERATOR,
        "generate",
        "--url",
        f"{server.url}/openapi.json",
        "--config",
        "client.yaml",
        "--meta",
        "none",
    ]
    made = subprocess.run([*command, "--fail-on-warning"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    tried = subprocess.run([sys.executable, "-c", TRIED, server.url], cwd=tmp_path, capture_output=True, text=True)
    assert tried.stdout == "red\n", tried.stderr
