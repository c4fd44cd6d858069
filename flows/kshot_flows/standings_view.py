"""How a comparison looks: tables for the terminal, and one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.markup import escape
from rich.table import Table

from kshot.episodes import Shape
from kshot_flows.standings import Measured, Standings

_COLOURS = {"better": "#3a923a", "worse": "#d9822b", "no difference": "#2f6fad"}  # told apart in grey too
_REFERENCE, _GREY = "#222222", "#8a8a8a"
_STYLES = {"better": "green", "worse": "yellow", "no difference": "blue"}
_LABEL = 26  # characters of a recipe in a line of the picture

_COSTS = {
    "adapting to {support} photos": lambda cost: (cost.adapt_ms, _ms(cost.adapt_ms)),
    "classifying a photo": lambda cost: (cost.classify_ms, _ms(cost.classify_ms)),
    "parameters": lambda cost: (cost.parameters, _count(cost.parameters)),
    "bundle": lambda cost: (cost.bundle_bytes, _megabytes(cost.bundle_bytes)),
}


def tables(found: Standings) -> Iterator[Any]:
    """What the terminal shows."""
    yield f"\n[bold]The same test episodes for all, of {found.data}[/bold]"
    table = _table("accuracy in %", "difference", "")
    for shape in found.shapes:
        table.add_row(f"[bold]{_words(shape)}[/bold]", f"[dim]{found.episodes[shape]:,} episodes[/dim]")
        for row in found.rows:
            measured = row.measured[shape]
            if row is found.reference:
                difference, verdict = "", "[dim]the reference[/dim]"
            else:
                difference = _points(measured)
                verdict = f"[{_STYLES[measured.verdict]}]{measured.verdict}[/]"
            table.add_row(f"  {escape(row.label)}", _percent(measured), difference, verdict)
        table.add_section()
    yield table
    shape = found.shapes[0]
    table = _table("adapting", "one photo", "parameters", "bundle")
    for row in found.rows:
        table.add_row(escape(row.label), *(cell(row.cost)[1] for cell in _COSTS.values()))
    yield table
    yield (
        f"[dim]± is half a 95 % interval; a difference is paired, episode by episode. Times: the ONNX bundle on one "
        f"CPU thread, adapting to {shape.ways * shape.shots} photos ({_words(shape)}), classifying photos one at a "
        f"time; medians of {found.rounds} rounds in turns.[/dim]\n"
    )


def picture(found: Standings) -> Figure:
    """Accuracies above, a panel for each shape, coloured by how they differ from the first; costs below."""
    labels = ["\n".join(textwrap.wrap(row.label, _LABEL, break_long_words=False)) for row in found.rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    height = max(0.42 * len(labels), 0.2 * lines)
    figure = Figure(figsize=(11.5, 2 * (height + 0.75) + 1.0), layout="constrained")
    [upper], [lower] = figure.subfigures(2, 1, squeeze=False, hspace=0.06)
    panels = upper.subplots(1, len(found.shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, found.shapes, strict=True):
        _accuracies(axes, found, shape)
    costs = lower.subplots(1, len(_COSTS), sharey=True, squeeze=False)[0]
    for axes, (title, cell) in zip(costs, _COSTS.items(), strict=True):
        support = found.shapes[0].ways * found.shapes[0].shots
        _cost(axes, title.format(support=support), [cell(row.cost) for row in found.rows])
    for first in (panels[0], costs[0]):
        first.set_yticks(range(len(labels)), [label.replace("$", r"\$") for label in labels], fontsize=9)
        first.set_ylim(len(labels) - 0.5, -0.5)
    counts = sorted({f"{count:,}" for count in found.episodes.values()})
    figure.suptitle(
        f"The same {' or '.join(counts)} test episodes for all, of {found.data}", fontsize=11, fontweight="bold"
    )
    how = "under each accuracy, the difference to the reference in points; ± is half a 95 % interval"
    figure.legend(
        handles=_legend(), loc="outside lower center", ncols=4, fontsize=8.5, frameon=False,
        title=f"{how}; times on one CPU thread", title_fontsize=8.5,
    )  # fmt: skip
    return figure


def _accuracies(axes: Axes, found: Standings, shape: Shape) -> None:
    for place, row in enumerate(found.rows):
        measured = row.measured[shape]
        colour = _REFERENCE if row is found.reference else _COLOURS[measured.verdict]
        axes.errorbar(
            measured.accuracy, place, xerr=measured.margin, fmt="o", markersize=7, capsize=4, linewidth=2, color=colour
        )
        beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "color": colour}
        alone = row is found.reference
        axes.annotate(
            _percent(measured), (1, place), xytext=(5, 0 if alone else 5), va="center", fontsize=8.5, **beside
        )
        if not alone:
            axes.annotate(_points(measured), (1, place), xytext=(5, -6), va="center", fontsize=7, **beside)
    axes.axvline(found.reference.measured[shape].accuracy, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_title(f"accuracy, {_words(shape)}", fontsize=9.5)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.margins(x=0.12)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    _plain(axes)


def _cost(axes: Axes, title: str, cells: Sequence[tuple[float, str]]) -> None:
    bars = axes.barh(range(len(cells)), [value for value, _ in cells], height=0.55, color=_GREY, alpha=0.6)
    axes.bar_label(bars, [text for _, text in cells], padding=4, fontsize=8.5)
    axes.set_title(title, fontsize=9.5)
    axes.set_xlim(0, 1.45 * max(value for value, _ in cells))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)


def _legend() -> list[Line2D]:
    shown = {
        "the reference": _REFERENCE,
        "better than it": _COLOURS["better"],
        "no difference to it": _COLOURS["no difference"],
        "worse than it": _COLOURS["worse"],
    }
    return [Line2D([], [], marker="o", linewidth=2, color=colour, label=name) for name, colour in shown.items()]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    return table


def _words(shape: Shape) -> str:
    return f"{shape.ways}-way {shape.shots}-shot"


def _percent(measured: Measured) -> str:
    return f"{100 * measured.accuracy:.2f} ± {100 * measured.margin:.2f}"


def _points(measured: Measured) -> str:
    return f"{100 * measured.difference:+.2f} ± {100 * measured.difference_margin:.2f}".replace("-", "−")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2g} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"


def _count(number: int) -> str:
    return f"{number:,}"


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB" if number < 1e8 else f"{number / 1e6:,.0f} MB"
