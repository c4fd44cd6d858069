"""Which version the MLflow registry names, and the download of its bundle."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kshot_runtime.errors import KshotError
from kshot_runtime.manifest import MANIFEST

_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Whoever follows a registry asks again soon anyway.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


class RegistryError(KshotError):
    """The registry did not say, or did not give, what it was asked for; it may the next time."""


@dataclass(frozen=True)
class Found:
    """A version, as the registry has it."""

    name: str
    version: str
    source: str
    sha256: str  # of bundle.json, which holds the hashes of the graphs; empty if none was registered


class Registry:
    """A model's versions in MLflow. The calls block, for as long as the network does."""

    def __init__(self, source: str, address: str = "") -> None:
        parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", source)
        if parts is None:
            raise KshotError(f"{source!r} names no model: models:/NAME@ALIAS follows one, models:/NAME/VERSION stays")
        self._address = address or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self._address:
            raise KshotError(
                f"no registry to find {source} in: set MLFLOW_TRACKING_URI to its address, or KSHOT_HOME to the folder "
                "of the project that trained it"
            )
        self.name, self._alias, self._version = parts.groups()
        for name, value in _ENVIRONMENT.items():  # MLflow reads some of them when it is imported
            os.environ.setdefault(name, value)
        self._client: Any = None

    def find(self) -> Found:
        """The version that serves, by the registry."""
        try:
            if self._client is None:
                from mlflow import MlflowClient

                self._client = MlflowClient(tracking_uri=self._address)
            if self._alias:
                version = self._client.get_model_version_by_alias(self.name, self._alias)
            else:
                version = self._client.get_model_version(self.name, self._version)
        except ImportError:
            raise KshotError("following a registry needs MLflow's client: pip install 'kshot[registry]'") from None
        except Exception as error:  # MLflow's own, requests', SQLAlchemy's
            raise RegistryError(f"the registry gives no version: {error}") from error
        return Found(self.name, str(version.version), version.source, version.tags.get(f"sha256.{MANIFEST}", ""))

    def download(self, found: Found, folder: Path) -> Path:
        """The files of a version, as they come, under this folder."""
        from mlflow.artifacts import download_artifacts

        try:
            return Path(download_artifacts(found.source, dst_path=str(folder), tracking_uri=self._address))
        except Exception as error:  # MLflow's own, requests', an object store's, the disk's
            raise RegistryError(f"version {found.version} of {found.name} cannot be fetched: {error}") from error
