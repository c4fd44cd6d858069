"""What is taken from a registry, and what it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kshot_runtime.errors import KshotError
from kshot_runtime.manifest import BundleError
from kshot_serve.models.registry import Registry
from kshot_serve.models.shelf import Shelf


def test_only_the_files_of_the_manifest_are_taken(shop: Any, bundles: list[Path], tmp_path: Path) -> None:
    """S10: whatever lay beside the bundle lay on the shelf too."""
    version = shop.register(bundles[0])
    beside = shop.artifacts(version)
    (beside / "evil.pkl").write_bytes(b"evil")
    (beside / "secret.bin").write_bytes(bytes(1_000_000))
    shop.promote(version)
    registry = Registry(shop.source, shop.address)
    folder = Shelf(tmp_path / "shelf").fetch(registry, registry.find())
    assert {path.name for path in folder.iterdir()} == {path.name for path in bundles[0].iterdir()}


@pytest.mark.parametrize("told", [True, False])
def test_no_file_may_be_larger_than_the_manifest_says(
    shop: Any, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """S10: there was no limit of size. A store may also send more than it listed."""
    version = shop.register(bundles[0])
    with (shop.artifacts(version) / "embed.onnx").open("ab") as file:
        file.write(bytes(1_000_000))
    shop.promote(version)
    if not told:
        from mlflow.entities import FileInfo

        names = [FileInfo(path.name, False, None) for path in bundles[0].iterdir()]
        monkeypatch.setattr("mlflow.artifacts.list_artifacts", lambda *_, **__: names)
    registry = Registry(shop.source, shop.address)
    why = "embed.onnx is no file of at most" if told else "has a file that is larger than its bundle.json says"
    with pytest.raises(BundleError, match=why):
        Shelf(tmp_path / "shelf").fetch(registry, registry.find())
    assert list((tmp_path / "shelf").iterdir()) == []
    (tmp_path / "large").write_bytes(bytes(2_000_000))  # other files may have any size again


def test_a_version_without_the_hash_of_its_manifest_is_refused_unless_that_is_meant(
    shop: Any, bundles: list[Path], tmp_path: Path
) -> None:
    from kshot_flows.tracking import stores

    version = shop.register(bundles[0])
    stores.client().delete_model_version_tag(shop.name, str(version), "sha256.bundle.json")
    shop.promote(version)
    registry, shelf = Registry(shop.source, shop.address), Shelf(tmp_path)
    with pytest.raises(BundleError, match=r"has no tag sha256\.bundle\.json"):
        shelf.fetch(registry, registry.find())
    assert (shelf.fetch(registry, registry.find(), unpinned=True) / "embed.onnx").is_file()


def test_the_command_takes_a_version_without_that_hash_only_if_told(
    shop: Any, bundles: list[Path], tmp_path: Path
) -> None:
    from kshot_flows.tracking import stores

    version = shop.register(bundles[0])
    stores.client().delete_model_version_tag(shop.name, str(version), "sha256.bundle.json")
    shop.promote(version)
    command = [Path(sys.executable).with_name("kshot"), "serve", shop.source, "--port", "0", "--folder", tmp_path]
    environment = os.environ | {"MLFLOW_TRACKING_URI": shop.address}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (refused.returncode, "has no tag sha256.bundle.json" in " ".join(refused.stderr.split())) == (1, True)
    with subprocess.Popen(
        [*command, "--unpinned"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as taken:
        try:
            assert taken.stdout is not None
            assert "version 1 at http" in taken.stdout.readline()
        finally:
            taken.terminate()


def test_a_folder_in_place_of_a_file_is_not_taken(shop: Any, bundles: list[Path], tmp_path: Path) -> None:
    version = shop.register(bundles[0])
    graph = shop.artifacts(version) / "embed.onnx"
    graph.unlink()
    graph.mkdir()
    (graph / "evil.pkl").write_bytes(b"evil")
    shop.promote(version)
    registry = Registry(shop.source, shop.address)
    with pytest.raises(BundleError, match=r"embed\.onnx is no file"):
        Shelf(tmp_path).fetch(registry, registry.find())


@pytest.mark.parametrize("source", ["models:/toy", "models:/@production", "models:/toy@", "models:/toy/latest"])
def test_a_source_that_names_no_model_is_told_what_would(source: str) -> None:
    with pytest.raises(KshotError, match="models:/NAME@ALIAS follows one"):
        Registry(source, "sqlite://")


def test_without_an_address_of_a_registry_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(KshotError, match="set MLFLOW_TRACKING_URI"):
        Registry("models:/toy@production")


def test_without_a_project_to_follow_the_command_says_what_is_missing_and_makes_none(tmp_path: Path) -> None:
    """Seen in review: an empty store was made and waited on; without all of MLflow there was a traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [Path(sys.executable).with_name("kshot"), "serve", "models:/toy@production", "--port", "0"],
        env=environment | {"KSHOT_HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "set MLFLOW_TRACKING_URI to its address" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mlflow").exists()
