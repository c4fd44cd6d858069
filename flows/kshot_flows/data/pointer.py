"""Reads and writes `data.dvc`, which has an `outs` entry with the version of each data set, without DVC.

No two lines of it are equal, and the first and last line of an entry never change. So git's built-in union merge, which
`.gitattributes` selects, merges branches that add or change different data sets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kshot_runtime.errors import KshotError

_FORMER = "data sets"  # under `meta`: each data set's version, when the whole folder was one output
_OURS = ("path", "md5", "size", "nfiles", "meta", "hash")  # keys of an entry; users may add others


@dataclass(frozen=True)
class Entry:
    """The recorded version of a data set."""

    md5: str  # DVC's hash of the folder, '....dir'
    version: str | None  # sha256 of its index; None if it was not recorded by kshot
    nfiles: int = 0
    size: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)  # keys that users added: remote, desc, ...


@dataclass(frozen=True)
class Pointer:
    """The content of a `data.dvc`."""

    file: Path
    text: str = ""
    sets: Mapping[str, Entry] = field(default_factory=dict)
    others: tuple[Mapping[str, Any], ...] = ()  # outputs that are not data sets
    former: bool = False  # whether a single output is the whole folder, so that all data sets have its md5
    twice: tuple[str, ...] = ()  # data sets changed by both sides of a merge: neither version counts

    @property
    def folder(self) -> str:
        return self.file.stem

    @classmethod
    def read(cls, root: Path) -> Pointer:
        """The pointer of a data folder; empty if there is none."""
        file = root.with_name(f"{root.name}.dvc")
        return cls.parse(file, file.read_text() if file.exists() else "")

    @classmethod
    def parse(cls, file: Path, text: str) -> Pointer:
        try:
            content = yaml.load(text, _Loader) or {}
            sets, others, twice, former = dict[str, Entry](), [], list[str](), False
            for out in content.get("outs") or []:
                folder, _, name = str(out["path"]).partition("/")
                if folder != file.stem or "/" in name:
                    others.append(out)
                elif not name:
                    former = True
                    versions = dict((content.get("meta") or {}).get(_FORMER) or {})
                    sets |= {name: Entry(out["md5"], version) for name, version in versions.items()}
                elif _TWICE in out or name in sets:
                    twice.append(name)
                else:
                    more = {key: value for key, value in out.items() if key not in _OURS}
                    meta = dict(out.get("meta") or {})
                    version = meta.pop("version", None)
                    more |= {"meta": meta} if meta else {}
                    sets[name] = Entry(out["md5"], version, out.get("nfiles", 0), out.get("size"), more)
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise KshotError(
                f"{file} cannot be read ({' '.join(str(error).split())}). If a merge left marks in it, keep one side: "
                f"git checkout --theirs {file.name} (or --ours); a former one comes back with: git checkout {file.name}"
            ) from None
        for name in twice:
            sets.pop(name, None)
        return cls(file, text, sets, tuple(others), former, tuple(dict.fromkeys(twice)))

    def refuse_twice(self, but: Iterable[str] = ()) -> None:
        """Raise an error for data sets with two versions, except those about to be recorded."""
        if wrong := [name for name in self.twice if name not in but]:
            raise KshotError(
                f"{self.file.name} has two versions of {', '.join(wrong)}: two branches changed it. Keep the lines of "
                f"one of them, or record what lies in {self.folder}/ now: kshot data commit {' '.join(wrong)}"
            )

    def changed(self, sets: Mapping[str, Entry], drop: Iterable[str] = ()) -> Pointer:
        """The pointer with some entries updated and some removed; everything else in the file stays."""
        kept = {name: entry for name, entry in {**self.sets, **sets}.items() if name not in set(drop)}
        twice = tuple(name for name in self.twice if name not in {*sets, *drop})
        outs = "".join(_block(self.folder, name, kept[name]) for name in sorted(kept))
        outs += "".join(yaml.safe_dump([dict(out)], sort_keys=False) for out in self.others)
        lines = self.text.splitlines(keepends=True)
        if self.former:
            lines = _without_former(lines)
        start = next((i for i, line in enumerate(lines) if line.startswith("outs:")), len(lines))
        end = next((i for i in range(start + 1, len(lines)) if re.match(r"[A-Za-z#]", lines[i])), len(lines))
        whole = "".join([*lines[:start], f"outs:\n{outs}" if outs else "outs: []\n", *lines[end:]])
        return replace(self, text=whole, sets=kept, former=False, twice=twice)

    def write(self) -> None:
        """Write atomically: after a kill or on a full disk the previous file is intact."""
        unfinished = self.file.with_name(f".{self.file.name}.unfinished")
        try:
            with unfinished.open("w") as output:
                output.write(self.text)
                output.flush()
                os.fsync(output.fileno())
            unfinished.replace(self.file)
        finally:
            unfinished.unlink(missing_ok=True)


_TWICE = "\0"


class _Loader(yaml.SafeLoader):
    """Detects duplicate keys in a mapping, of which YAML would use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        made = super().construct_mapping(node, deep)
        keys = [key.value for key, _ in node.value]
        return made if len(set(keys)) == len(keys) else {**made, _TWICE: True}


def _block(folder: str, name: str, entry: Entry) -> str:
    path = f"{folder}/{name}"
    path = path if re.fullmatch(r"[\w./-]+", path) else json.dumps(path)
    more = dict(entry.more)
    meta = {**({"version": entry.version} if entry.version else {}), **more.pop("meta", {})}
    lines = [f"path: {path}", f"md5: {entry.md5}"]
    lines += [] if entry.size is None else [f"size: {entry.size}  # {name}"]
    lines += [f"nfiles: {entry.nfiles}  # {name}"] if entry.nfiles else []
    lines += [f"meta:  # {name}", *(f"  {line}" for line in _lines(meta))] if meta else []
    lines += _lines(more)
    lines += [f"hash: md5  # {name}"]
    return "".join(f"{'- ' if not i else '  '}{line}\n" for i, line in enumerate(lines))


def _lines(values: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(dict(values), sort_keys=False).splitlines() if values else []


def _without_former(lines: list[str]) -> list[str]:
    """Take the list of versions out of `meta`, and `meta` too if nothing else is in it."""
    start = next((i for i, line in enumerate(lines) if line.strip() == f"{_FORMER}:"), None)
    if start is None:
        return lines
    depth = len(lines[start]) - len(lines[start].lstrip())
    end = next((i for i in range(start + 1, len(lines)) if _depth(lines[i]) <= depth), len(lines))
    rest = [*lines[:start], *lines[end:]]
    meta = next(i for i, line in enumerate(rest) if line.startswith("meta:"))
    return rest if meta + 1 < len(rest) and _depth(rest[meta + 1]) else [*rest[:meta], *rest[meta + 1 :]]


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
