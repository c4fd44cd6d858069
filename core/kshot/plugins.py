"""Plugin discovery: loads each installed entry point of the group `kshot`; a broken one affects no other."""

from __future__ import annotations

import difflib
import linecache
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from kshot import hookspecs
from kshot_runtime.errors import KshotError

GROUP = "kshot"


@dataclass(frozen=True)
class Provided:
    """A learner, backbone or data source, and the plugin that provides it."""

    kind: str  # the hook without its prefix: learners, backbones, datasets
    name: str
    value: Any
    plugin: str  # the entry point's name
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.name!r} from plugin {self.plugin!r} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be loaded, and why."""

    plugin: str
    distribution: str
    version: str
    reason: str
    where: str = ""  # the line of its code that failed, if known


@dataclass
class Found:
    """Everything that the installed plugins provide; `learner`, `backbone` and `dataset` look up a name."""

    provided: list[Provided] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    def learner(self, name: str) -> Provided:
        return self._only("learners", "algorithm", name)

    def backbone(self, name: str) -> Provided:
        return self._only("backbones", "backbone", name)

    def dataset(self, name: str) -> Provided:
        return self._only("datasets", "data source", name)

    def of(self, kind: str) -> list[Provided]:
        return sorted((p for p in self.provided if p.kind == kind), key=lambda p: p.name)

    def _only(self, kind: str, noun: str, name: str) -> Provided:
        matches = [p for p in self.of(kind) if p.name == name]
        if not matches:  # a name such as "timm/*" stands for a family of them
            families = [p for p in self.of(kind) if p.name.endswith("/*") and name.startswith(p.name[:-1])]
            matches = [replace(p, name=name, value=p.value.named(name[len(p.name) - 1 :])) for p in families]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise KshotError(
                f"two plugins provide the {noun} {' and '.join(map(str, matches))}. "
                f"Uninstall one, or rename its {noun}."
            )
        names = sorted({p.name for p in self.of(kind)})
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        broken = "".join(f" Plugin {b.plugin!r} is broken: {b.reason}" for b in self.broken)
        raise KshotError(
            f"no {noun} named {name!r}{hint} (installed: {', '.join(names) or 'none'}). "
            f"A plugin that was just added to a project is found after installing it again: pip install -e .{broken}"
        )


@cache
def find() -> Found:
    """Load every installed plugin, once in a process."""
    return load(entry_points(group=GROUP))


def load(points: Iterator[EntryPoint] | Any) -> Found:
    """Load these entry points, each in a separate plugin manager."""
    found = Found()
    for point in sorted(points, key=lambda p: p.name):
        dist = point.dist
        origin = (point.name, dist.name if dist else "?", dist.version if dist else "?")
        try:
            found.provided += _load(point, origin)
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; the others still work
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            found.broken.append(Broken(*origin, reason, place(error, point.module)))
    return found


def place(error: BaseException, module: str) -> str:
    """The innermost line in the package of `module` in the traceback of an error or its causes; "" if there is none."""
    package = module.partition(".")[0]
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in reversed(list(traceback.walk_tb(cause.__traceback__))):
            if frame.f_globals.get("__name__", "").partition(".")[0] == package:
                file = Path(frame.f_code.co_filename)
                near = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
                return f"{near}:{line}, in {frame.f_code.co_name}: {linecache.getline(str(file), line).strip()}"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return ""


def _load(point: EntryPoint, origin: tuple[str, str, str]) -> list[Provided]:
    manager = pluggy.PluginManager("kshot")
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), point.name)
    manager.check_pending()  # a misspelt hook is an error
    provided = [
        Provided("learners", learner.name, learner, *origin)
        for learners in manager.hook.kshot_learners()
        for learner in learners
    ]
    for kind in ("backbones", "datasets"):
        for mapping in getattr(manager.hook, f"kshot_{kind}")():
            provided += [Provided(kind, name, value, *origin) for name, value in mapping.items()]
    if not provided:
        raise KshotError("it provides nothing: mark a function named like a hook with @hookimpl")
    return provided
