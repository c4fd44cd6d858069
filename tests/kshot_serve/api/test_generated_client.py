"""A client that openapi-python-client makes of the API's description: it works, downloads and photos included.

`make test` installs that tool apart, since it excludes versions that this project uses; without it this is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAME = "openapi-python-client"
GENERATOR = shutil.which(NAME, path=Path(sys.prefix, "generator", "bin")) or shutil.which(NAME)
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


@pytest.mark.skipif(GENERATOR is None, reason=f"{NAME} is not installed")
def test_a_generated_client_adds_classifies_and_downloads(
    server: Any, photo: Callable[..., bytes], tmp_path: Path
) -> None:
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(photo(colour))
    [config] = re.findall(r"```yaml\n(package_name_override.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "client.yaml").write_text(config)
    assert GENERATOR
    beside = os.pathsep.join((str(Path(GENERATOR).parent), os.environ["PATH"]))  # where its ruff is
    made = subprocess.run(
        [GENERATOR, "generate", "--url", f"{server.url}/openapi.json", "--config", "client.yaml", "--meta", "none",
         "--fail-on-warning"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PATH": beside},
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    tried = subprocess.run([sys.executable, "-c", TRIED, server.url], cwd=tmp_path, capture_output=True, text=True)
    assert tried.stdout == "red\n", tried.stderr
