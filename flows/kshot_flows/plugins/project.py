"""Creates a plugin project by copying the working template in `starter/` under another name."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import os
import re
import shlex
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kshot_runtime.errors import KshotError

STARTER = Path(__file__).parent / "starter"

FILES = {
    "kshot_nearest.py": "the algorithm: change this",
    "nearest.toml": "a recipe that trains it",
    "test_nearest.py": "the contract as tests, and one of its arithmetic",
    "pyproject.toml": "the entry point by which kshot finds it",
    "README.md": "the commands",
    ".gitignore": "what runs leave behind",
}
"""The files of `starter/`, and what they are for."""

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def create(name: str, into: Path) -> dict[Path, str]:
    """Write a plugin project to the folder `name` in `into`, atomically; returns its files and what each is for."""
    check_name(name)
    words = _words(name)
    folder = into / name
    if not into.is_dir():
        raise KshotError(f"there is no folder {into}. Make it first, or choose another with --into FOLDER.")
    if os.path.lexists(folder):
        raise KshotError(f"{folder} exists already. Remove it, or choose another name, or another place with --into.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=into) as scratch:
            staging = Path(scratch) / "new"
            staging.mkdir()
            for file in FILES:
                text = (STARTER / file).read_text(encoding="utf-8")
                (staging / _renamed(file, words)).write_text(_renamed(text, words), encoding="utf-8")
            staging.rename(folder)
    except OSError as error:
        raise KshotError(
            f"cannot write {folder}: {error.strerror or error}. Nothing is left of it; another place is chosen with "
            "--into FOLDER."
        ) from None
    return {folder / _renamed(file, words): what for file, what in FILES.items()}


def commands(folder: Path) -> dict[str, str]:
    """The commands of a project's README, with their comments."""
    readme = (folder / "README.md").read_text(encoding="utf-8")
    _, block, _ = re.split(r"^```(?:bash)?\n", readme, maxsplit=2, flags=re.MULTILINE)
    steps = (line.partition("#") for line in block.splitlines())
    return {f"cd {shlex.quote(str(folder))}": ""} | {command.strip(): what.strip() for command, _, what in steps}


def check_name(name: str) -> None:
    """Refuse a name that is invalid as a distribution, module, class or learner, or already in use."""
    if not _NAME.fullmatch(name):
        guess = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        hint = f"; did you mean {guess!r}?" if _NAME.fullmatch(guess) else "."
        raise KshotError(
            f"{name!r} cannot name a plugin{hint} A name is lower-case letters, digits and single hyphens, "
            "and begins with a letter."
        )
    if name.startswith(("kshot-", "kshot_")):
        raise KshotError(f"the distribution is called kshot-NAME by itself: kshot plugin new {name[6:]}")
    words = _words(name)
    if any(map(keyword.iskeyword, (name, words["Nearest"]))):
        raise KshotError(f"{name!r} is a keyword of Python. {_another(name)}")
    if words["Nearest"] in _imported():
        raise KshotError(
            f"a class {words['Nearest']!r} would hide what a plugin imports by that name. {_another(name)}"
        )
    if whose := _bearer(name, words):
        raise KshotError(f"{name!r} is taken: {whose}. {_another(name)}")


def _words(name: str) -> dict[str, str]:
    """Replacements for the names in the template."""
    parts = re.split("[-_]", name)
    return {
        "kshot_nearest": f"kshot_{'_'.join(parts)}",
        "test_nearest": f"test_{'_'.join(parts)}",
        "kshot-nearest": f"kshot-{'-'.join(parts)}",
        "Nearest": "".join(part.capitalize() for part in parts),
        "nearest": name,
    }


def _renamed(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(words), lambda found: words[found[0]], text)


def _imported() -> set[str]:
    """The names that the template's module imports."""
    tree = ast.parse((STARTER / "kshot_nearest.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _bearer(name: str, words: dict[str, str]) -> str | None:
    """What already uses one of a new plugin's names; None if nothing does."""
    from kshot import plugins  # takes seconds

    found = plugins.find()
    for one in found.provided:
        if one.name == name:
            return f"{one.kind[:-1]} {one}"
    for broken in found.broken:
        if broken.plugin == name:
            return f"plugin {name!r} of {broken.distribution} {broken.version}, which is broken: {broken.reason}"
    for wanted in (name, words["kshot-nearest"]):
        try:
            there = distribution(wanted)
        except PackageNotFoundError:
            continue
        return f"the distribution {there.name} {there.version} is installed"
    for module in (name.replace("-", "_"), words["kshot_nearest"]):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:  # a plain folder has none
            return f"there is a Python module {module} already"
    return None


def _another(name: str) -> str:
    return f"Choose another, such as my-{name}."
