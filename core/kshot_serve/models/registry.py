"""Which version the MLflow registry names, and the download of its bundle."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kshot_runtime.errors import KshotError
from kshot_runtime.manifest import MANIFEST, BundleError, Manifest

_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Whoever follows a registry asks again soon anyway.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
_MANIFEST_BYTES = 16 << 20


class RegistryError(KshotError):
    """The registry did not name a version, or did not send its files; it may the next time."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a model, as the registry has it."""

    name: str
    number: str
    source: str
    sha256: str  # of bundle.json, which holds the hashes of the graphs; empty if none was registered

    def __str__(self) -> str:
        return f"version {self.number} of {self.name}"


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
        self._name, self._alias, self._number = parts.groups()
        for name, value in _ENVIRONMENT.items():  # MLflow reads some of them when it is imported
            os.environ.setdefault(name, value)
        self._client: Any = None

    def may_name(self, version: RegisteredVersion) -> bool:
        """Whether the source could stand for this version: an alias for any of its model, a number for one."""
        return version.name == self._name and self._number in (None, version.number)

    def find(self) -> RegisteredVersion:
        """The version that the source stands for now."""
        try:
            if self._client is None:
                from mlflow import MlflowClient

                self._client = MlflowClient(tracking_uri=self._address)
            if self._alias:
                version = self._client.get_model_version_by_alias(self._name, self._alias)
            else:
                version = self._client.get_model_version(self._name, self._number)
        except ImportError:
            raise KshotError("following a registry needs MLflow's client: pip install 'kshot[registry]'") from None
        except Exception as error:  # MLflow's own, requests', SQLAlchemy's
            raise RegistryError(f"the registry gives no version: {error}") from error
        sha256 = version.tags.get(f"sha256.{MANIFEST}", "")
        return RegisteredVersion(self._name, str(version.version), version.source, sha256)

    def download(self, version: RegisteredVersion, folder: Path) -> None:
        """Into this folder bundle.json, which has the hash that was registered, and the files that it names.

        No other files, and none larger than bundle.json says. To be called in a process of its own: while a file
        comes, the process can write no larger one.
        """
        from mlflow.artifacts import download_artifacts, list_artifacts

        def take(name: str, most: int) -> None:
            if name not in there:
                raise BundleError(f"{version} is not a bundle: it lacks {name}")
            if there[name].is_dir or (there[name].file_size or 0) > most:
                raise BundleError(f"{version}: {name} is no file of at most {most:,} bytes")
            with _no_larger_files(most):
                download_artifacts(f"{version.source}/{name}", dst_path=str(folder), tracking_uri=self._address)

        try:
            listed = list_artifacts(version.source, tracking_uri=self._address)
            there = {posixpath.basename(each.path): each for each in listed}
            take(MANIFEST, _MANIFEST_BYTES)
            content = (folder / MANIFEST).read_bytes()
            if version.sha256 not in ("", hashlib.sha256(content).hexdigest()):
                raise BundleError(
                    f"{version} is not what was registered: its {MANIFEST} is changed. Restore it, or register the "
                    "bundle anew."
                )
            try:
                files = Manifest.model_validate_json(content).files
            except ValidationError:
                return  # whoever reads the bundle says what is wrong with it
            for name, facts in files.items():
                take(name, facts.size)
        except BundleError:
            raise
        except Exception as error:  # MLflow's own, requests', an object store's, the disk's
            if os.strerror(errno.EFBIG) in str(error):
                raise BundleError(f"{version} has a file that is larger than its {MANIFEST} says") from error
            raise RegistryError(f"{version} cannot be fetched: {error}") from error


@contextmanager
def _no_larger_files(size: int) -> Iterator[None]:
    """Writing a file beyond this size fails in this process, whatever a store sends."""
    try:
        from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit, setrlimit
    except ImportError:  # not on Windows
        yield
        return
    soft, hard = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (size if hard == RLIM_INFINITY else min(size, hard), hard))
    try:
        yield
    finally:
        setrlimit(RLIMIT_FSIZE, (soft, hard))
