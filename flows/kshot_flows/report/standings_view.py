"""Displays a comparison: tables for the terminal, and one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.markup import escape

from kshot_flows.console.tables import NARROW, TRUST, numbers, table, trust
from kshot_flows.report.standings import Draw, Measured, Standings

_COLOURS = {"better": "#3a923a", "worse": "#d9822b", "no difference": "#2f6fad"}  # distinguishable in greyscale
_REFERENCE, _GREY = "#222222", "#8a8a8a"
_STYLES = {"better": "green", "worse": "yellow", "no difference": "blue"}
_LABEL = 26  # maximal characters of a recipe's name per line of the picture

_COSTS = {
    "adapting to {support} photos": lambda cost: (cost.adapt_ms, _ms(cost.adapt_ms)),
    "classifying a photo": lambda cost: (cost.classify_ms, _ms(cost.classify_ms)),
    "parameters": lambda cost: (cost.parameters, _count(cost.parameters)),
    "bundle": lambda cost: (cost.bundle_bytes, _megabytes(cost.bundle_bytes)),
}


def tables(found: Standings) -> Iterator[Any]:
    """Tables for the terminal."""
    yield f"\n[bold]The same test episodes for all, of {found.data}[/bold]"
    listed = table("in %", "accuracy", "difference", "ECE", *TRUST[1:], padding=NARROW)
    numbers(listed, 6)
    for draw in found.draws:
        label = found.label(draw).replace(", ", ",\n")
        listed.add_row(f"[bold]{label}[/bold]", f"[dim]{found.episodes[draw]:,} episodes[/dim]")
        for row in found.rows:
            measured = row.measured[draw]
            difference = "[dim]the reference[/dim]"
            if row is not found.reference:
                difference = f"{_points(measured)}\n[{_STYLES[measured.verdict]}]{measured.verdict}[/]"
            cells = [cell.removesuffix(" %") for cell in trust(measured.ece, measured.open_set)]
            listed.add_row(escape(row.label), _percent(measured), difference, *cells)
        listed.add_section()
    yield listed
    shape = found.draws[0].shape
    listed = table("", "adapting", "one photo", "parameters", "bundle")
    numbers(listed, 4)
    for row in found.rows:
        listed.add_row(escape(row.label), *(cell(row.cost)[1] for cell in _COSTS.values()))
    yield listed
    yield (
        f"[dim]± is half a 95 % interval; a difference is paired, episode by episode. ECE: calibration error. Known "
        "that pass and unknown let in: photos, at the default threshold. Times: the ONNX bundle on one "
        f"CPU thread, adapting to {shape.ways * shape.shots} photos ({found.label(found.draws[0])}), classifying "
        f"photos one at a time; medians of {found.rounds} rounds in turns.[/dim]\n"
    )


def picture(found: Standings) -> Figure:
    """Accuracies in one panel per kind of episode, coloured by the difference to the first recipe.

    Below: known photos that pass and unknown ones let in, and costs.
    """
    labels = ["\n".join(textwrap.wrap(row.label, _LABEL, break_long_words=False)) for row in found.rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    height = max(0.42 * len(labels), 0.2 * lines)
    width = max(11.5, 2.9 * len(found.draws))
    figure = Figure(figsize=(width, 3 * (height + 0.75) + 1.0), layout="constrained")
    [upper], [middle], [lower] = figure.subfigures(3, 1, squeeze=False, hspace=0.06)
    panels, trusted = (part.subplots(1, len(found.draws), sharey=True, squeeze=False)[0] for part in (upper, middle))
    for above, below, draw in zip(panels, trusted, found.draws, strict=True):
        _accuracies(above, found, draw)
        _trust(below, found, draw)
    costs = lower.subplots(1, len(_COSTS), sharey=True, squeeze=False)[0]
    for axes, (title, cell) in zip(costs, _COSTS.items(), strict=True):
        support = found.draws[0].shape.ways * found.draws[0].shape.shots
        _cost(axes, title.format(support=support), [cell(row.cost) for row in found.rows])
    for first in (panels[0], trusted[0], costs[0]):
        first.set_yticks(range(len(labels)), [label.replace("$", r"\$") for label in labels], fontsize=9)
        first.set_ylim(len(labels) - 0.5, -0.5)
    counts = sorted({f"{count:,}" for count in found.episodes.values()})
    figure.suptitle(
        f"The same {' or '.join(counts)} test episodes for all, of {found.data}", fontsize=11, fontweight="bold"
    )
    how = "under each accuracy, the difference to the reference in points; ± is half a 95 % interval"
    figure.legend(
        handles=_legend(), loc="outside lower center", ncols=6, fontsize=8.5, frameon=False,
        title=f"{how}; ECE is the calibration error; times on one CPU thread", title_fontsize=8.5,
    )  # fmt: skip
    return figure


def _accuracies(axes: Axes, found: Standings, draw: Draw) -> None:
    for place, row in enumerate(found.rows):
        measured = row.measured[draw]
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
    axes.axvline(found.reference.measured[draw].accuracy, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.margins(x=0.12)
    _shares(axes, f"accuracy, {found.label(draw)}")


def _trust(axes: Axes, found: Standings, draw: Draw) -> None:
    for place, row in enumerate(found.rows):
        measured = row.measured[draw]
        words = f"ECE {100 * measured.ece:.1f}"
        if unknown := measured.open_set:
            words += f"\nAUROC {100 * unknown.auroc:.1f}"
            axes.plot([unknown.false_accepts, unknown.accepted], [place] * 2, color=_GREY, linewidth=1.2, zorder=1)
            axes.plot(unknown.accepted, place, "o", markersize=7, color=_REFERENCE)
            axes.plot(unknown.false_accepts, place, "o", markersize=7, color=_REFERENCE, markerfacecolor="white")
        axes.annotate(
            words, (1, place), (5, 0), va="center", fontsize=7,
            xycoords=("axes fraction", "data"), textcoords="offset points",
        )  # fmt: skip
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1])
    _shares(axes, f"unknown photos, {found.label(draw)}")


def _shares(axes: Axes, title: str) -> None:
    axes.set_title(title.replace(", ", "\n"), fontsize=9.5)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
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
    dots = {"known photos that pass": _REFERENCE, "unknown ones let in": "white"}
    return [
        *(Line2D([], [], marker="o", linewidth=2, color=colour, label=name) for name, colour in shown.items()),
        *(Line2D([], [], marker="o", linewidth=0, color=_REFERENCE, markerfacecolor=colour, label=name)
          for name, colour in dots.items()),
    ]  # fmt: skip


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
