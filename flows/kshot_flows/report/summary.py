"""The summary that a run prints at its end: steps, accuracy, and links to results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.markup import escape
from rich.table import Table

from kshot.evaluation.statistics import interval
from kshot_flows.console.tables import NARROW, TRUST, console, numbers, table, trust
from kshot_flows.report import card
from kshot_flows.store.products import (  # fmt: skip
    Attempt,
    DataVersion,
    Exported,
    Product,
    Promotion,
    Registered,
    Scores,
    Trained,
    relative,
)
from kshot_flows.store.results import Done
from kshot_flows.tracking import stores

if TYPE_CHECKING:
    from pathlib import Path

    from kshot.data.episodes import Shape
    from kshot_flows.console.profiling import Profile
    from kshot_flows.report.standings import Comparison

T = TypeVar("T")


def show(done: Sequence[Done], command: str) -> None:
    """Print the result of a pipeline from its steps `done`; `command` is the command that started it."""
    out = console()
    out.print(_steps(done))
    products = [step.product for step in done]
    if (trained := _find(products, Trained)) and trained.tried:
        out.print(_tried(trained))
    if scores := _find(products, Scores):
        out.print(_scores(scores))
    bundle, version, promotion = _find(products, Exported), _find(products, Registered), _find(products, Promotion)
    if bundle and version and promotion:
        out.print(_verdict(promotion))
        # paths and commands are not wrapped, so that they can be copied
        out.print(_next(bundle, version, promotion, command), soft_wrap=True)


def show_profile(profile: Profile, folder: Path | None) -> None:
    """Print time and memory per step, and the folder of the traces."""
    out = console()
    if folder is None:
        out.print("Nothing ran, so there is no profile. Change a value that training depends on, such as seed=2.")
        return
    out.print(profile.table())
    kept = ", ".join(sorted(file.name for file in folder.iterdir()))
    out.print(f"[bold]Profile[/bold]      {escape(relative(folder))}: {escape(kept)}", soft_wrap=True)


def show_comparison(found: Comparison, command: str) -> None:
    """Print a comparison of recipes, and links to its results."""
    from kshot_flows.report import standings_view  # brings matplotlib

    out = console()
    for part in standings_view.tables(found.standings):
        out.print(part)
    about = {
        "The picture": relative(found.folder / "comparison.png"),
        "The table": relative(found.folder / "comparison.json"),
        "Both": f"MLflow run {found.run}, {_pages()}",
        "Again": command,
    }
    for what, value in about.items():
        out.print(f"[bold]{what:<13}[/bold]{escape(value)}", soft_wrap=True)


def _steps(done: Sequence[Done]) -> Table:
    listed = table("step", "", "seconds", "what it gave")
    listed.columns[2].justify = "right"
    for step in done:
        how = "[cyan]reused[/cyan]" if step.reused else "[green]ran[/green]"
        listed.add_row(step.step, how, f"{step.seconds:.1f}", escape(_summary(step.product)))
    return listed


def _size(shape: Shape) -> str:
    return f"{shape.ways}-way {shape.shots}-shot"


def _percent(accuracy: float, margin: float) -> str:
    return f"{100 * accuracy:.2f} ± {100 * margin:.2f} %"


def _summary(product: Product) -> str:
    match product:
        case DataVersion():
            names = ", ".join(packed.name for packed in product.all)
            return f"{names}, version {(product.md5 or product.version)[:12]}"
        case Trained():
            if product.validation is None or product.margin is None:
                return "taken as it was built"
            episodes = f"{_size(product.shape)} validation" if product.shape else "validation"
            best = f"{_percent(product.validation, product.margin)} on {episodes} episodes"
            if product.steps == 0:
                return f"{product.chosen or 'taken as it was built'}: {best}"
            memory = f" in {product.memory / 1e6:,.0f} MB" if product.memory else ""
            return f"{best} at step {product.best_step} of {product.steps}, {product.seconds:.0f} s of training{memory}"
        case Scores():
            return f"{product.lines[0].episodes} episodes of each shape from {product.split}"
        case Exported():
            return (
                f"ONNX answers {100 * product.agreement:.2f} % of the queries as torch does "
                f"(logits differ by {product.largest_difference:.1e}); {product.latency_ms:.2f} ms a photo"
            )
        case Registered():
            return f"{product.name} version {product.version}"
        case Promotion():
            return f"{product.stage}: {product.why}"


def _tried(trained: Trained) -> Table:
    """The selected head, and the best candidate of each other learner."""
    shapes = trained.tried[0].shapes
    listed = table("heads tried, the best of each learner", *map(_size, shapes), "seconds", "", padding=NARROW)
    numbers(listed, len(shapes) + 1)
    best: dict[str, Attempt] = {}
    for one in sorted(trained.tried, key=lambda one: (not one.chosen, -one.accuracy)):
        best.setdefault(one.label.split()[0], one)
    for learner, one in sorted(best.items(), key=lambda item: -item[1].accuracy):
        accuracies = [_percent(*each) for each in zip(one.accuracies, one.margins, strict=True)]
        about = ["[bold green]chosen[/]" if one.chosen else ""]
        about += ["the baseline" if learner == "cosine" else ""]
        listed.add_row(escape(one.label), *accuracies, f"{one.seconds:.1f}", ", ".join(filter(None, about)))
    return listed


def _scores(scores: Scores) -> Table:
    listed = table("test episodes", "accuracy (±:\n95 % interval)", *TRUST, padding=NARROW)
    numbers(listed, 1 + len(TRUST))
    for line in scores.lines:
        measured = f"[bold]{_percent(line.accuracy, line.margin)}[/bold]"
        listed.add_row(scores.label(line).replace(", ", ",\n"), measured, *trust(line.ece, line.open_set))
        if line is scores.lines[0] and (cosine := scores.cosine()) is not None:
            listed.add_row("cosine baseline", _percent(*interval(cosine)))
    return listed


def _verdict(promotion: Promotion) -> str:
    what = f"{promotion.name} version {promotion.version}"
    if promotion.stage != "Production":
        return f"[bold yellow]{what} {promotion.stands}:[/bold yellow] {escape(promotion.why)}"
    mind = escape(f" Mind: it {'; '.join(promotion.warnings)}." if promotion.warnings else "")
    return f"[bold green]{what} is in production.[/bold green][yellow]{mind}[/yellow]"


def served(done: Sequence[Done]) -> str:
    """The argument of `kshot serve` for the result: the version in production, or the bundle."""
    products = [step.product for step in done]
    bundle, promotion = _find(products, Exported), _find(products, Promotion)
    return _source(bundle, promotion) if bundle and promotion else ""


def _source(bundle: Exported, promotion: Promotion) -> str:
    return f"models:/{promotion.name}@production" if promotion.stage == "Production" else relative(bundle.folder)


def _next(bundle: Exported, version: Registered, promotion: Promotion, command: str) -> str:
    folder = escape(relative(bundle.folder))
    source = escape(_source(bundle, promotion))
    report = escape(relative(version.evidence.file.with_name(card.REPORT)))
    return f"""
[bold]Report[/bold]       {report}
[bold]Serve it[/bold]     kshot serve {source}
[bold]The bundle[/bold]   {folder}
[bold]In Python[/bold]    from kshot_runtime.bundle import Bundle
             bundle = Bundle.open("{folder}")
             state = bundle.adapt(["a.png", "b.png"], ["class a", "class b"])
             print(bundle.classify(state, ["new.png"]).names)
[bold]Where from[/bold]   kshot trace {version.name} {version.version}
[bold]Versions[/bold]     kshot models {version.name}
[bold]MLflow[/bold]       {escape(_pages())}
[bold]Again[/bold]        {escape(command)}"""


def _pages() -> str:
    """Links to MLflow's pages."""
    store = stores.uri()
    return stores.public(store if store.startswith("http") else f"mlflow ui --backend-store-uri {store}")


def _find(products: Sequence[Product], kind: type[T]) -> T | None:
    return next((product for product in products if isinstance(product, kind)), None)
