"""Which extra of kshot to install for a storage or database URL whose driver is missing."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.util import find_spec

# By scheme: the extra, what DVC needs of it, and what MLflow does.
_NEEDED = {
    "s3": ("s3", "dvc_s3", "boto3"),
    "gs": ("gs", "dvc_gs", "google.cloud.storage"),
    "azure": ("azure", "dvc_azure", "azure.storage.blob"),
    "wasbs": ("azure", "dvc_azure", "azure.storage.blob"),
    "postgres": ("postgres", "", "psycopg2"),
    "postgresql": ("postgres", "", "psycopg2"),
    "postgresql+psycopg2": ("postgres", "", "psycopg2"),
    "postgresql+psycopg": ("postgres", "", "psycopg"),
}


def missing(url: str, dvc: bool = False) -> str | None:
    """A message that says what to install so that MLflow or DVC can use a URL; None if nothing is missing."""
    scheme = url.partition("://")[0].lower()
    extra, *modules = _NEEDED.get(scheme, ("", "", ""))
    module = modules[0] if dvc else modules[1]
    if not module or _installed(module):
        return None
    shown = re.sub(r"//[^/@]*@", "//", url)
    package = re.sub("[._]", "-", module)
    return f'{shown} needs the Python package {package}, which is not installed: pip install "kshot[{extra}]"'


def _installed(module: str) -> bool:
    with suppress(ModuleNotFoundError):  # of a parent
        return find_spec(module) is not None
    return False
