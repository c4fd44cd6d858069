"""`kshot doctor`: checks libraries, devices, disk, servers, data and registry."""

from __future__ import annotations

import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from kshot_flows import project
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

_SHOWN = ("torch", "onnxruntime", "onnxruntime-gpu", "prefect", "mlflow", "dvc")
_LITTLE, _TOO_LITTLE = 2 << 30, 200 << 20  # bytes of free disk
_State = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    state: _State
    says: str
    todo: str = ""


_Found = Iterator[tuple[_State, str, str]]


def examine(explain: Callable[[BaseException], str]) -> Iterator[Finding]:
    """Run all checks; an exception becomes a finding, with the message of `explain`."""
    for what, check in _CHECKS.items():
        try:
            for state, says, todo in check():
                yield Finding(what, state, says, todo)
        except Exception as error:
            yield Finding(what, "wrong", explain(error))


def _libraries() -> _Found:
    from packaging.requirements import Requirement

    there = {"python": platform.python_version()}
    for text in requires("kshot") or ():
        wanted = Requirement(text)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in ("", "train")):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            if wanted.name != "kshot":
                yield "wrong", f"{wanted.name} is not installed", "pip install 'kshot[train]'"
            continue
        there |= {wanted.name: found} if wanted.name in _SHOWN else {}
        if not wanted.specifier.contains(found, prereleases=True):
            todo = f"pip install '{wanted.name}{wanted.specifier}'"
            yield "wrong", f"{wanted.name} is {found}, and kshot needs {wanted.specifier}", todo
    yield "ok", ", ".join(f"{name} {found}" for name, found in there.items()), ""


def _devices() -> _Found:
    import torch
    from onnx import TensorProto, helper

    from kshot_flows.store import embeddings
    from kshot_runtime.bundle import session

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab"]
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "nothing", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    try:
        session(model, "cuda", 1)
        yield "ok", "onnxruntime serves on a GPU", ""
    except KshotError as error:
        there = "pip install" in str(error)  # a GPU is there
        yield "warning" if there else "ok", f"onnxruntime serves on the CPU: {error}", ""
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield "ok", f"torch trains on {embeddings.device()} ({', '.join(cards) or 'no GPU'})", ""


def _disk() -> _Found:
    left = shutil.disk_usage(project.home()).free
    state: _State = "ok" if left > _LITTLE else "warning" if left > _TOO_LITTLE else "wrong"
    yield state, f"{left / 2**30:.1f} GB left in {project.home()}", "" if state == "ok" else "free some; see kshot gc"


def _mlflow() -> _Found:
    door = stores.client()
    count = len(door.search_experiments())
    yield "ok", f"{stores.public(door.tracking_uri)} answers, with {count} experiments", ""
    if database := stores.database_of(door.tracking_uri):
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            [state] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            yield "wrong", f"{database} is damaged: {state}", "restore it from a backup, or sqlite3 ... .recover"


def _registry() -> _Found:
    from kshot_flows import registry

    names = registry.models()
    for name in names:
        for sentence in registry.disagreements(name):
            yield "wrong", f"{name}: {sentence}", "kshot gc"
    yield "ok", f"{len(names)} models", ""


def _prefect() -> _Found:
    from kshot_flows.run import embedded

    configured = embedded.configured()
    with embedded.api() as url:
        yield "ok", f"{url} answers" if configured else "the embedded server starts and answers", ""


def _data() -> _Found:
    from kshot_flows.data import versioning

    root = versioning.data_root()
    if why_not := versioning.why_not_versioned(root):
        yield "warning", why_not, ""
    todo = {
        "missing": "kshot data pull", "damaged": "kshot data pull, or import it again",
        "changed": "kshot data commit, or kshot data pull", "not recorded": "kshot data commit",
    }  # fmt: skip
    for name, state in versioning.state_of(root).items():
        sound = state == "recorded" or (state == "not recorded" and why_not)
        verdict: _State = "ok" if sound else "wrong" if state == "damaged" else "warning"
        yield verdict, f"{name} is {state}", "" if sound else todo[state]


def _remote() -> _Found:
    from kshot_flows.data import versioning

    root = versioning.data_root()
    if not versioning.versioned(root):
        return
    try:
        url, there = versioning.remote(root)
    except KshotError as error:
        none = "no DVC remote is configured" in str(error)
        yield "warning" if none else "wrong", str(error), ""
    else:
        yield ("ok", f"{url} answers", "") if there else ("warning", f"{url} holds nothing yet", "kshot data push")


def _leftovers() -> _Found:
    from kshot_flows.run import leftovers

    found = list(leftovers.find())
    says = f"{len(found)} of earlier faults, {sum(each.size for each in found) / 2**20:.0f} MB"
    yield ("warning", says, "kshot gc") if found else ("ok", says, "")


_CHECKS: dict[str, Callable[[], _Found]] = {
    "libraries": _libraries, "devices": _devices, "disk": _disk, "MLflow": _mlflow, "registry": _registry,
    "Prefect": _prefect, "data": _data, "remote": _remote, "leftovers": _leftovers,
}  # fmt: skip
