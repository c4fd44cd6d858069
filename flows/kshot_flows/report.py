"""What a run of the pipeline says at its end: what was done, how good it is, and where to look next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.markup import escape
from rich.table import Table

from kshot_flows import progress, tracking
from kshot_flows.engine import Done
from kshot_flows.products import DataVersion, Exported, Product, Promotion, Registered, Scores, Trained, relative
from kshot_flows.tables import table

if TYPE_CHECKING:
    from kshot_flows.compare import Comparison

T = TypeVar("T")


def show(done: Sequence[Done], command: str) -> None:
    """Print the result of a pipeline whose steps are `done`; `command` is what started it."""
    out = progress.console()
    out.print(_steps(done))
    products = [step.product for step in done]
    if scores := _find(products, Scores):
        out.print(_scores(scores))
    bundle, version, promotion = _find(products, Exported), _find(products, Registered), _find(products, Promotion)
    if bundle and version and promotion:
        out.print(_verdict(promotion))
        out.print(_next(bundle, version, promotion, command), soft_wrap=True)  # to copy: paths and commands stay whole


def show_comparison(found: Comparison, command: str) -> None:
    """Print how recipes stand to each other, and where to look next."""
    from kshot_flows import standings_view  # brings matplotlib

    out = progress.console()
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


def _summary(product: Product) -> str:
    match product:
        case DataVersion():
            names = ", ".join(packed.name for packed in product.all)
            return f"{names}, version {(product.md5 or product.version)[:12]}"
        case Trained():
            if product.validation is None or product.margin is None:
                return "taken as it was built"
            best = f"{100 * product.validation:.2f} ± {100 * product.margin:.2f} % on validation"
            if product.steps == 0:
                return f"taken as it was built: {best}"
            return f"{best} at step {product.best_step} of {product.steps}, {product.seconds:.0f} s of training"
        case Scores():
            return f"{product.lines[0].episodes} episodes of each shape from {product.split}"
        case Exported():
            return (
                f"ONNX answers {100 * product.agreement:.2f} % of the queries as torch does "
                f"(logits differ by {product.largest_difference:.1e}); {product.latency_ms:.1f} ms a photo"
            )
        case Registered():
            return f"{product.name} version {product.version}"
        case Promotion():
            return f"{product.stage}: {product.why}"


def _scores(scores: Scores) -> Table:
    listed = table(
        "test episodes",
        "queries",
        "accuracy\n(95 % interval)",
        "calibration\nerror",
        "unknown\nlet in",
        "known\nlet in",
    )
    for line in scores.lines:
        told = line.open_set
        listed.add_row(
            line.label,
            str(line.shape.queries),
            f"[bold]{100 * line.accuracy:.2f} ± {100 * line.margin:.2f} %[/bold]",
            f"{100 * line.ece:.1f} %",
            *(["", ""] if told is None else [f"{100 * told.false_accepts:.1f} %", f"{100 * told.accepted:.1f} %"]),
        )
    return listed


def _verdict(promotion: Promotion) -> str:
    what = f"{promotion.name} version {promotion.version}"
    if promotion.stage == "Production":
        return f"[bold green]{what} is in production.[/bold green]"
    return f"[bold yellow]{what} is in {promotion.stage.lower()}:[/bold yellow] {escape(promotion.why)}"


def _next(bundle: Exported, version: Registered, promotion: Promotion, command: str) -> str:
    in_production = promotion.stage == "Production"
    folder = escape(relative(bundle.folder))
    source = f"models:/{version.name}@production" if in_production else folder
    return f"""
[bold]Serve it[/bold]     kshot serve {source}
[bold]The bundle[/bold]   {folder}
[bold]In Python[/bold]    from kshot_runtime.bundle import Bundle
             bundle = Bundle.open("{folder}")
             state = bundle.adapt(["a.png", "b.png"], ["class a", "class b"])
             print(bundle.classify(state, ["new.png"]).names)
[bold]Where from[/bold]   kshot trace {version.name} {version.version}
[bold]Versions[/bold]     kshot models {version.name}
[bold]Pictures[/bold]     {escape(_pages())}
[bold]Again[/bold]        {escape(command)}"""


def _pages() -> str:
    """Where MLflow shows it all."""
    store = tracking.store()
    return tracking.public(store if store.startswith("http") else f"mlflow ui --backend-store-uri {store}")


def _find(products: Sequence[Product], kind: type[T]) -> T | None:
    return next((product for product in products if isinstance(product, kind)), None)
