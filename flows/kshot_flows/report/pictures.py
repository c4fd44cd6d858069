"""The pictures of a run: functions from numbers to matplotlib figures."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from kshot.evaluation.calibration import Calibration
    from kshot.evaluation.open_set import OpenSet

# distinguishable in greyscale
_BLUE, _ORANGE, _GREEN, _RED, _GREY = ("#2f6fad", "#d9822b", "#3a923a", "#c23b3b", "#8a8a8a")
_LEGEND: dict[str, Any] = {"edgecolor": "none", "framealpha": 0.85}
_STAR: dict[str, Any] = {"marker": "*", "edgecolors": "black", "linewidths": 0.8}
_SHARE = PercentFormatter(1, symbol=" %")


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Class names in scripts that matplotlib's font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def learning_curve(
    train_steps: Sequence[int],
    train_losses: Sequence[float],
    steps: Sequence[int],
    accuracies: Sequence[float],
    margins: Sequence[float],
    *,
    chosen: int | None = None,
) -> Figure:
    """Training loss, and validation accuracy with its 95 % interval; `chosen` is the step of the best weights."""
    figure = _figure(7.5, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    at, losses = np.asarray(train_steps, float), np.asarray(train_losses, float)
    upper.plot(at, losses, color=_GREY, alpha=0.45, linewidth=0.8, label="each report")
    if len(losses) >= 20:
        width = max(5, len(losses) // 25)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        upper.plot(at[width - 1 :], smooth, color=_ORANGE, linewidth=1.6, label=f"mean of the last {width}")
        upper.legend(**_LEGEND, fontsize=8)
    upper.set_ylabel("training loss")
    at, mean, half = (np.asarray(values, float) for values in (steps, accuracies, margins))
    lower.fill_between(at, mean - half, mean + half, color=_BLUE, alpha=0.2, linewidth=0, label="95 % interval")
    lower.plot(at, mean, color=_BLUE, marker="o", markersize=3, linewidth=1.5, label="validation episodes")
    if chosen is not None:
        lower.axvline(chosen, color=_GREEN, linestyle="--", linewidth=1.2, label=f"kept: step {chosen:,}")
    lower.set_ylabel("accuracy")
    lower.set_xlabel("step of the outer loop")
    lower.yaxis.set_major_formatter(_SHARE)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.legend(**_LEGEND, fontsize=8, loc="lower right")
    _title(figure, "Learning curve")
    for axes in (upper, lower):
        _plain(axes)
    return figure


def episode_accuracies(accuracies: Sequence[float] | np.ndarray, title: str = "Accuracy by episode") -> Figure:
    """Histogram of accuracy over episodes, with the mean and its 95 % interval."""
    values = np.asarray(accuracies, float)  # (episodes,)
    mean, half = (
        float(values.mean()),
        1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0,
    )
    figure = _figure(7, 4)
    axes = figure.subplots()
    levels = np.unique(values)
    step = float(np.diff(levels).min()) if 1 < len(levels) <= 60 else 0.02  # one query more or less, mostly
    edges = np.arange(math.floor(max(0, levels[0]) / step) - 2, round(1 / step) + 1) * step + step / 2
    axes.hist(values, bins=edges.tolist(), color=_BLUE, alpha=0.75, edgecolor="white", linewidth=0.5)
    axes.axvspan(mean - half, mean + half, color=_ORANGE, alpha=0.35, linewidth=0)
    label = f"mean {100 * mean:.2f} ± {100 * half:.2f} % (95 % interval)"
    axes.axvline(mean, color=_ORANGE, linewidth=1.8, label=label)
    axes.xaxis.set_major_formatter(_SHARE)
    axes.set_xlim(edges[0], 1 + step / 2)
    axes.set_xticks([tick for tick in axes.get_xticks() if edges[0] <= tick <= 1])
    axes.set_xlabel("accuracy on the queries of one episode")
    axes.set_ylabel("episodes")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(**_LEGEND, loc="upper left")
    _title(figure, f"{title}: {len(values)} episodes")
    _plain(axes)
    return figure


def confusion(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], title: str = "One episode") -> Figure:
    """Confusion matrix: rows are the true classes, columns the predicted ones."""
    ways = len(names)
    counts = np.zeros((ways, ways), int)  # (true, predicted)
    np.add.at(counts, (np.asarray(truth, int), np.asarray(predicted, int)), 1)
    size = max(4.2, 2.2 + 0.42 * ways)
    figure = _figure(size + 1.2, size)
    axes = figure.subplots()
    picture = axes.imshow(counts, cmap="Blues", vmin=0)
    for row in range(ways):
        for column in range(ways):
            if counts[row, column]:
                dark = counts[row, column] > 0.6 * counts.max()
                axes.text(
                    column, row, str(counts[row, column]), ha="center", va="center",
                    color="white" if dark else "black", fontsize=9 if ways <= 12 else 7,
                )  # fmt: skip
    short = [_short(name) for name in names]
    axes.set_xticks(range(ways), short, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(ways), short, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(picture, ax=axes, label="queries", shrink=0.8, ticks=MaxNLocator(integer=True))
    right = int(np.trace(counts))
    _title(figure, f"{title}: {right} of {counts.sum()} queries right ({100 * right / counts.sum():.1f} %)")
    return figure


def embedding_map(
    support: np.ndarray,
    support_labels: np.ndarray,
    query: np.ndarray,
    query_labels: np.ndarray,
    names: Sequence[str],
    title: str = "Embeddings of one episode",
) -> Figure:
    """The first two principal components of an episode's embeddings: (S, D) support, (Q, D) query."""
    points = np.concatenate([support, query]).astype(float)  # (S + Q, D)
    points = points - points.mean(0)
    _, spread, directions = np.linalg.svd(points, full_matrices=False)
    flat = points @ directions[:2].T  # (S + Q, 2)
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))  # embeddings may have one dimension only
    share = spread[:2] ** 2 / max((spread**2).sum(), 1e-12)
    share = np.pad(share, (0, 2 - len(share)))
    near, far = flat[: len(support)], flat[len(support) :]
    figure = _figure(7.5, 5.5)
    axes = figure.subplots()
    star = 170 if len(support) <= 30 else 80
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for way, name in enumerate(names):
        color = [palette(way % palette.N)]
        mine = np.asarray(query_labels) == way
        axes.scatter(far[mine, 0], far[mine, 1], c=color, s=22, alpha=0.65, linewidths=0, label=_short(name))
        mine = np.asarray(support_labels) == way
        axes.scatter(
            near[mine, 0], near[mine, 1], c=color, s=star, marker="*", edgecolors="black", linewidths=0.8, zorder=3
        )
    axes.scatter([], [], c="white", s=star, marker="*", edgecolors="black", linewidths=0.8, label="support")
    axes.set_xlabel(f"first principal component ({100 * share[0]:.0f} % of the variance)")
    axes.set_ylabel(f"second ({100 * share[1]:.0f} %)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(**_LEGEND, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + (len(names) > 20))
    _title(figure, title)
    _plain(axes)
    return figure


def reliability(
    confidences: np.ndarray, right: np.ndarray, *, ece: float, bins: int = 15, title: str = "Reliability"
) -> Figure:
    """Reliability diagram: accuracy against confidence in equal bins; on the diagonal it is calibrated."""
    confidences, right = np.asarray(confidences, float), np.asarray(right, float)  # (answers,)
    bin_of = np.minimum((confidences * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    used = counts > 0
    accuracy = np.bincount(bin_of, right, minlength=bins)[used] / counts[used]
    confidence = np.bincount(bin_of, confidences, minlength=bins)[used] / counts[used]
    centres = (np.arange(bins) + 0.5) / bins
    figure = _figure(6, 6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.bar(centres[used], accuracy, width=0.94 / bins, color=_BLUE, alpha=0.75, label="accuracy in the bin")
    upper.vlines(
        confidence, np.minimum(accuracy, confidence), np.maximum(accuracy, confidence), color=_RED, linewidth=2
    )
    upper.plot(confidence, accuracy, "o", color=_RED, markersize=3.5, label="gap to its mean confidence")
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1)
    upper.legend(**_LEGEND, fontsize=8, loc="upper left")
    lower.bar(centres, counts / counts.sum(), width=0.94 / bins, color=_GREY)
    lower.set_ylabel("answers")
    lower.set_xlabel("confidence: probability of the predicted class")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(_SHARE)
        _plain(axes)
    lower.xaxis.set_major_formatter(_SHARE)
    _title(figure, f"{title}: expected calibration error {100 * ece:.1f} % over {len(right):,} answers")
    return figure


def unknown(fit: Calibration, found: OpenSet, *, title: str = "Unknown") -> Figure:
    """Known queries that pass against unknown ones let in: thresholds on validation episodes, and the default one."""
    figure = _figure(6, 6)
    axes = figure.subplots()
    points = sorted((point.false_accepts, point.accepted) for point in fit.points)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="chance")
    axes.plot(*zip(*points, strict=True), color=_BLUE, marker="o", markersize=3, label="validation: other thresholds")
    for colour, where, at in ((_BLUE, "validation", fit), (_ORANGE, "test", found)):
        words = f"{where}, default threshold: {100 * at.accepted:.0f} % pass, {100 * at.false_accepts:.0f} % let in"
        axes.scatter(at.false_accepts, at.accepted, c=colour, s=190, zorder=3, label=words, **_STAR)
    axes.set_xlabel("unknown queries let in")
    axes.set_ylabel("known queries that pass")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_SHARE)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(**_LEGEND, fontsize=8, loc="lower right")
    _title(figure, f"{title}: AUROC of unknown classes {100 * found.auroc:.1f} %")
    _plain(axes)
    return figure


def episode_sheet(
    support: np.ndarray,
    support_labels: np.ndarray,
    query: np.ndarray,
    query_labels: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    *,
    title: str = "One episode",
    ways: int = 10,
    queries: int = 8,
) -> Figure:
    """The images of an episode: a row per class with its support, then its queries, framed by right or wrong.

    Images are uint8, (N, C, H, W) with one or three channels. At most `ways` rows and `queries` queries in a row are
    drawn, wrong ones first and labelled with the predicted class.
    """
    labels, truth, predicted = (np.asarray(values, int) for values in (support_labels, query_labels, predicted))
    rows = list(range(min(ways, len(names))))
    shots = min(5, max(int((labels == way).sum()) for way in rows))
    shown = min(queries, max(int((truth == way).sum()) for way in rows))
    # Fixed layout in inches, so that long names do not move the pictures apart.
    cell, gap, left, top = 0.86, 0.3, 1.75, 0.85
    width = max(left + cell * (shots + shown) + gap + 0.1, left + cell * shots + gap + 3.6)  # for the labels above
    height = top + (cell + 0.16) * len(rows)
    figure = Figure(figsize=(width, height))

    def place(row: int, column: int) -> Axes:
        x = left + cell * column + (gap if column >= shots else 0)
        y = height - top - (cell + 0.16) * row - cell
        return figure.add_axes((x / width, y / height, 0.93 * cell / width, 0.93 * cell / height))

    def write(x: float, y: float, text: str, **how: Any) -> None:
        figure.text(x / width, 1 - y / height, text, **{"fontsize": 9, **how})

    write(left, top - 0.18, "support", color=_GREY)
    explained = "queries: green is right, red says what it was taken for"
    write(left + cell * shots + gap, top - 0.18, explained, color=_GREY)
    for row, way in enumerate(rows):
        middle = top + (cell + 0.16) * row + 0.55 * cell
        write(left - 0.1, middle, _short(names[way], 22), ha="right", va="center")
        for column, index in enumerate(np.flatnonzero(labels == way)[:shots]):
            _image(place(row, column), support[index], _GREY)
        asked = np.flatnonzero(truth == way)
        asked = np.concatenate([asked[predicted[asked] != way], asked[predicted[asked] == way]])[:shown]
        for column, index in enumerate(asked, start=shots):
            axes, correct = place(row, column), predicted[index] == way
            _image(axes, query[index], _GREEN if correct else _RED)
            if not correct:
                axes.set_title(_short(names[predicted[index]], 14), fontsize=6.5, color=_RED, pad=2)
    more = f" (the first {len(rows)} of {len(names)} classes)" if len(rows) < len(names) else ""
    right = int((truth == predicted).sum())
    _title(figure, f"{title}: {right} of {len(truth)} queries right{more}")
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=11, fontweight="bold")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _image(axes: Axes, image: np.ndarray, frame: str) -> None:
    """Draw one (C, H, W) uint8 image in a coloured frame."""
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    pixels = np.moveaxis(image, 0, -1)  # (H, W, C)
    if pixels.shape[-1] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=255)
    else:
        axes.imshow(pixels)
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(2.5)


def _short(name: str, length: int = 18) -> str:
    """A class name shortened in the middle to fit, with $ escaped for matplotlib."""
    half = (length - 1) // 2
    text = name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
    return text.replace("$", r"\$")
