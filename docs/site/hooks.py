"""MkDocs hooks that generate pages from the code: learners, recipes, the API, and linked source files.

Pages of docs/ link to files of the repository by relative paths. On the site such a link leads to a generated page with
the file's text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from kshot import plugins
from kshot.plugins import Provided
from kshot.recipe import DataSettings, EvaluationSettings
from kshot.training import Training
from kshot_flows import recipes
from kshot_flows.cli.algorithms import about, recipes_of, settings
from kshot_flows.registry.gate import GateSettings
from kshot_flows.report import figures

ROOT = Path(__file__).parents[2]
ELSEWHERE = {  # files outside docs/ that become pages
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/LEADERBOARD.md": "leaderboard.md",
}
API = {
    "kshot": "What plugin authors import.",
    "kshot.data": "",
    "kshot.training": "",
    "kshot.evaluation": "",
    "kshot.export": "",
    "kshot.recipe": "",
    "kshot.testing": "",
    "kshot_runtime.bundle": "",
    "kshot_client": "",
}
MODULES = {"kshot.data": ["datasets", "episodes", "importing", "sources", "augmentation", "embeddings"],
           "kshot.evaluation": ["scores", "calibration", "open_set", "verification", "statistics"]}  # fmt: skip
SECTIONS = {"dataset": DataSettings, "training": Training, "evaluation": EvaluationSettings, "gate": GateSettings}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> None:
    """Fill the parts of the navigation that the code decides."""
    learners = [f"learners/{one.name}.md" for one in plugins.find().of("learners")]
    for entry in config.nav or []:
        if "Learners" in entry:
            entry["Learners"] += learners
        if "API" in entry:
            entry["API"] = [{name: f"api/{name}.md"} for name in API]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files in docs/."""

    def add(path: str, text: str) -> None:
        files.append(File.generated(config, path, content=text))

    for path, page in ELSEWHERE.items():
        if (ROOT / path).exists():
            add(page, (ROOT / path).read_text())
    for one in plugins.find().of("learners"):
        add(f"learners/{one.name}.md", learner_page(one))
    for name in API:
        add(f"api/{name}.md", api_page(name))
    add("style.css", "td:first-child code { white-space: nowrap; }\n")
    linked = {target for file in files.documentation_pages() for target in outside(file.content_string, file.src_uri)}
    for path in sorted(linked):
        if (ROOT / path).is_file():  # else the link is left broken, which a strict build reports
            add(f"source/{path}.md", source_page(path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links for the site, and insert the tables of recipes and learners."""
    uri = page.file.src_uri
    for marker, made in {"<!-- learners -->": learner_table, "<!-- recipes -->": recipe_list}.items():
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    if uri.startswith("source/"):
        return markdown

    def link(found: re.Match[str]) -> str:
        target = resolved(found[2], uri)
        return f"{found[1]}{posixpath.relpath(site_path(target), posixpath.dirname(uri) or '.')}{found[3]}"

    return _LINK.sub(link, markdown)


def outside(markdown: str, uri: str) -> Iterator[str]:
    """The files of the repository, other than pages and pictures of docs/, that a page links to."""
    for _, target, _ in _LINK.findall(markdown):
        path = resolved(target, uri)
        if site_path(path).startswith("source/"):
            yield path


def resolved(target: str, uri: str) -> str:
    """Where in the repository a link leads, from the page at `uri` of the site."""
    origin = next((path for path, page in ELSEWHERE.items() if page == uri), f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def site_path(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def source_page(path: str) -> str:
    """A source file as a page, excluded from search."""
    kind = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".json": "json", ".md": "markdown"}
    language = kind.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text()
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n`````{language}\n{text}\n`````\n"


def api_page(name: str) -> str:
    """The API page of a module, or of all modules of a package that exports nothing itself."""
    parts = [f"{name}.{module}" for module in MODULES[name]] if name in MODULES else [name]
    options = "    options:\n      heading_level: 2\n      show_root_full_path: true\n"
    return f"# {name}\n\n{API[name]}\n\n" + "\n".join(f"::: {part}\n{options}" for part in parts)


def learner_page(one: Provided) -> str:
    """The page of an algorithm: description, settings, recipes, figures and code."""
    file = Path(str(one.value.__module__).replace(".", "/")).with_suffix(".py")
    parts = [f"# {one.name}", *about(one)]
    parts += ["## Settings", settings_table(one.value.Config), "Supported normalisations of the backbone: " +
              ", ".join(f"`{norm}`" for norm in one.value.norms) + "; the first is the default."]  # fmt: skip
    parts += ["## Recipes", listed(recipes_of(one.name))] if recipes_of(one.name) else []
    if rows := list(figures.load().rows(learner=one.name)):
        parts += ["## Figures", "Accuracy in % over test episodes, with its 95 % interval; [Results](../results.md) "
                  "explains the protocol and the signs."]  # fmt: skip
        for run, of_run in groupby(rows, key=lambda row: row.run):
            columns = ("episodes", "ours", "transductive", "published", "difference")
            lines = [
                (figures.words(row.shape), str(row.ours), str(row.transductive or ""),
                 row.paper.show(row.shape) if row.paper else "", row.verdict)
                for row in of_run
            ]  # fmt: skip
            name = run.data if run.method == one.name else f"{run.method}: {run.data}"
            parts += [f"### {name}", table(columns, lines), f"{run.trained}; {run.episodes:,} test episodes. "
                      f"`{run.command}`"]  # fmt: skip
    if (ROOT / "plugins" / file).is_file():
        parts += ["## Code", f"[{file}](../../plugins/{file})"]
    return "\n\n".join(parts) + "\n"


def learner_table() -> str:
    """A table of all algorithms: idea, and accuracy on Omniglot if recorded."""
    reached = {(row.run.method, row.shape): row.ours for row in figures.load().rows(data="omniglot")}
    lines = [
        (f"[{one.name}](learners/{one.name}.md)", about(one)[0], *(str(reached.get((one.name, shape), "")) for shape in
         ("5w1s", "20w1s")))
        for one in plugins.find().of("learners")
    ]  # fmt: skip
    return table(("learner", "idea", "Omniglot, 5-way 1-shot", "20-way 1-shot"), lines)


def recipe_list() -> str:
    """The settings of each section, then every bundled recipe."""
    parts = ["## Settings"]
    for section, config in SECTIONS.items():
        parts += [f"### `[{section}]`", settings_table(config)]
    parts.append("## Bundled recipes")
    for name, path in recipes.recipes().items():
        parts += [f"### {name}", f"```toml\n{path.read_text().strip()}\n```"]
    return "\n\n".join(parts)


def settings_table(config: Any) -> str:
    rows = ((f"`{name}`", f"`{default}`", takes, what) for name, default, takes, what in settings(config))
    return table(("setting", "default", "takes", "what it does"), rows)


def listed(names: Iterable[str]) -> str:
    return "\n".join(f"- [`kshot run {name}`](../recipes.md#{name})" for name in names)


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)
