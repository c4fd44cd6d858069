"""Write the tables and the picture of docs/performance.md from bench/results/speed.json.

    python bench/performance_page.py

Replaces the text between `<!-- speed -->` and `<!-- end of speed -->`, and likewise for `causes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "bench" / "results" / "speed.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance.png"
_BLOCK = re.compile(r"(<!-- (speed|causes) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

Found = Mapping[str, Any]


def main() -> None:
    found = json.loads(SPEED.read_text())
    PAGE.write_text(rewritten(PAGE.read_text(), found))
    draw(found["rows"])


def rewritten(text: str, found: Found) -> str:
    """The page with its blocks of figures regenerated."""
    made = {"speed": rows(found), "causes": causes(found)}
    return _BLOCK.sub(lambda block: f"{block[1]}\n{made[block[2]]}\n\n{block[3]}", text)


def rows(found: Found) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    about = f"{found['machine']}; {found['what']}; {found['date']}, commit {found['commit']}; {versions}."
    picture = "![Ratio to the best of the others, with its interval and what it must reach](performance.png)"
    columns = ("what", "against", "ratio", "middle half", "at least", "kshot", "others")
    return f"{about}\n\n{picture}\n\n{table(columns, map(cells, found['rows']))}"


def causes(found: Found) -> str:
    columns = ("what", "beside", "times as fast", "middle half", "with", "without")
    lines = []
    for row in found["causes"]:
        what, against, _, half, _, ours, others = cells(row)
        lines.append((what, against, f"**{number(row['ratio'])}**", half, ours, others.removeprefix("without ")))
    return table(columns, lines)


def table(columns: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *lines))


def cells(row: Found) -> tuple[str, ...]:
    lower = row["better"] == "lower"
    unit = " s" if not row["theirs"] else ""
    verdict = "✓" if reached(row) else "✗"
    others = ", ".join(f"{name} {number(value)}" for name, value in row["theirs"].items())
    return (
        row["what"],
        row["against"] or "—",
        f"**{number(row['ratio'])}{unit}** {verdict}",
        f"{number(row['low'])} to {number(row['high'])}",
        f"at most {row['bar']:g}{unit}" if lower else f"{row['bar']:g}",
        f"{number(row['ours'])} {row['unit']}",
        f"{others}{'; ' + row['note'] if 'note' in row else ''}",
    )


def reached(row: Found) -> bool:
    return bool(row["ratio"] <= row["bar"] if row["better"] == "lower" else row["ratio"] >= row["bar"])


def sentence(row: Found) -> str:
    """A row as text for the terminal."""
    what, against, ratio, half, bar, ours, others = cells(row)
    return f"{what}: {ratio.replace('*', '')} ({half}; bar {bar}) beside {against}: kshot {ours}, {others}"


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(rows: Sequence[Found]) -> None:
    """Plot each ratio to a peer with its interval and its target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["theirs"]][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(shown) + 1.2), layout="constrained")
    for place, row in enumerate(shown):
        # If lower is better, the ratio is inverted, so that right is always better.
        ratio, low, high, bar = (
            1 / row[key] if row["better"] == "lower" else row[key] for key in ("ratio", "low", "high", "bar")
        )
        axes.barh(place, ratio, color="#4c78a8" if reached(row) else "#e45756", height=0.6)
        axes.plot([low, high], [place, place], color="black", linewidth=1.5)
        axes.plot([bar, bar], [place - 0.38, place + 0.38], color="#f2a900", linewidth=2.5)
    axes.set_yticks(range(len(shown)), [f"{row['what'].replace('`', '')}\nbeside {row['against']}" for row in shown])
    axes.tick_params(axis="y", labelsize=7)
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 10, 40], ["0.5", "1", "2", "4", "10", "40"])
    axes.set_xlabel("times as fast as the best other (memory: times as little); yellow: what it must reach")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
