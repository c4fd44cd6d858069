"""Write the tables of docs/results.md from the committed figures (flows/kshot_flows/report/figures.json).

    python bench/results_table.py

Replaces the text between `<!-- figures: DATA -->` and `<!-- end of figures -->`; the rest of the page is hand-written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kshot_flows.report import figures
from kshot_flows.report.figures import Figures, Published, Row, Run

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
COLUMNS = (
    "learner", "episodes", "ours, inductive", "ours, transductive", "published", "code, run by others", "difference",
    "training", "command",
)  # fmt: skip
_BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def main() -> None:
    RESULTS.write_text(rewritten(RESULTS.read_text(), figures.load()))


def rewritten(text: str, known: Figures) -> str:
    """The page with every block of figures regenerated; SystemExit if a data set has no block."""
    places = [data for _, data, _ in _BLOCK.findall(text)]
    if without := [data for data in known.data if data not in places]:
        raise SystemExit(f"docs/results.md has no place for {without}: add <!-- figures: {without[0]} --> and its end")
    return _BLOCK.sub(lambda block: f"{block[1]}\n{tables(known, block[2])}\n\n{block[3]}", text)


def tables(known: Figures, data: str) -> str:
    """The tables of one data set: accuracies, training, calibration, and the sources of published figures."""
    rows = list(known.rows(data=data))
    runs = [run for run in known.runs if run.data == data]
    if not rows:
        return "Not run yet."
    sources = [f"- {entry.method}, {_which(entry)}: {entry.source}" for entry in known.sources(data)]
    trained = [(run.method, run.trained, run.time, _memory(run), run.recorded) for run in runs]
    return "\n\n".join(
        [
            _table(COLUMNS, [_cells(row, first=row.shape == row.run.shapes[0]) for row in rows]),
            _table(("learner", "trained", "time", "memory", "recorded at"), trained),
            *(
                [
                    "Calibration and rejection of unknown classes, in %. *Known that pass* and *unknown let in* are "
                    "measured at one threshold, chosen on validation episodes: older rows (known near 95) accept 95 % "
                    "of the known, newer ones balance both errors.",
                    trust,
                ]
                if (trust := _trust(runs))
                else []
            ),
            *(["Sources of the other figures:", "\n".join(sources)] if sources else []),
        ]
    )


def _cells(row: Row, *, first: bool) -> tuple[str, ...]:
    transductive = str(row.transductive or "not measured") if row.run.transductive else "the same"
    return (
        row.run.method if first else "",
        figures.words(row.shape),
        str(row.ours),
        transductive,
        _beside(row.paper, row.shape),
        _beside(row.code, row.shape),
        row.verdict,
        row.run.time if first else "",
        f"`{row.run.command}`" if first else "",
    )


def _trust(runs: list[Run]) -> str:
    columns = ("learner", "episodes", "calibration error", "known that pass", "unknown let in", "AUROC")
    rows = [
        (run.method if shape == next(iter(run.trust)) else "", figures.words(shape),
         *("" if number is None else f"{number:.1f}" for number in (it.ece, it.accepted, it.false_accepts, it.auroc)))
        for run in runs for shape, it in run.trust.items()
    ]  # fmt: skip
    return _table(columns, rows) if rows else ""


def _beside(entry: Published | None, shape: str) -> str:
    return "" if entry is None else entry.show(shape)


def _which(entry: Published) -> str:
    what = "published" if entry.code is None else "run by others"
    return what + ("" if entry.verified else " (not checked against the paper)")


def _memory(run: Run) -> str:
    return "" if run.memory_gb is None else f"{run.memory_gb:g} GB"


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
