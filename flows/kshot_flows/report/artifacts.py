"""Artifacts of a Prefect run: result tables, the gate's report, contact sheets, and links to MLflow."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from kshot.data.datasets import SHEET
from kshot_flows import registry
from kshot_flows.console import progress
from kshot_flows.console.tables import TRUST, trust
from kshot_flows.store.products import DataVersion, Exported, Product, Promotion, Registered, Scores, Trained, relative
from kshot_flows.tracking import stores

_SHEET = 900  # pixels of a contact sheet's longer side


def publish(product: Product) -> None:
    """Publish a task's result as artifacts of the current Prefect run, if there is one."""
    from prefect.context import FlowRunContext
    from prefect.settings import get_current_settings

    if FlowRunContext.get() is None or not get_current_settings().logging.to_api.enabled:
        return
    try:
        _publish(product)
    except Exception as error:  # a failed artifact must not fail the run
        progress.say(f"  Prefect's page does not show this result: {type(error).__name__}")


def _publish(product: Product) -> None:
    match product:
        case DataVersion():
            for packed in product.all:
                found = packed.open()
                splits = ", ".join(f"{count} {split}" for split, count in found.splits.items())
                lines = [f"{len(found.images):,} images, classes: {splits}", f"version {packed.version[:12]}"]
                words = "  \n".join([*lines, packed.source])
                _markdown(f"data {packed.name}", lines[0], words, _sheet(found.folder / SHEET))
        case Trained():
            reached = "" if product.validation is None else f"{100 * product.validation:.2f} % on validation episodes"
            about = f"{product.steps} steps, {reached or 'not validated'}"
            _markdown("learner", about, about, f"MLflow run `{product.run}`")
            if product.tried:
                _table(
                    "heads", "Heads that were compared on validation episodes", [_head(one) for one in product.tried]
                )
        case Scores():
            _table(
                "scores",
                "Accuracy on test episodes, ± half its 95 % interval",
                [_line(product, line) for line in product.lines],
            )
        case Exported():
            about = f"ONNX answers {100 * product.agreement:.2f} % of the queries as torch does"
            _table("bundle", about, [{"file": pin.path, "sha256": pin.sha256, "bytes": pin.file.stat().st_size}
                              for pin in product.files])  # fmt: skip
        case Registered():
            for what, link in _links(product).items():
                _link(what, link)
        case Promotion():
            report = registry.gate_report(product.name, product.version)
            words = f"**Version {product.version} of {product.name} {product.stands}**: {product.why}"
            _markdown("gate", f"{product.stage}: {product.why}", f"{words}\n\n{report.to_markdown() if report else ''}")


def _head(one: Any) -> dict[str, str]:
    sizes = zip(one.shapes, one.accuracies, one.margins, strict=True)
    figures = {f"{s.ways}-way {s.shots}-shot": f"{100 * a:.2f} ± {100 * m:.2f} %" for s, a, m in sizes}
    return {"head": one.label, **figures, "": "chosen" if one.chosen else ""}


def _line(scores: Scores, line: Any) -> dict[str, str]:
    cells = zip((words.replace("\n", " ") for words in TRUST), trust(line.ece, line.open_set), strict=True)
    return {"test episodes": scores.label(line), "accuracy": f"{100 * line.accuracy:.2f} ± {100 * line.margin:.2f} %",
            **dict(cells)}  # fmt: skip


def _links(version: Registered) -> dict[str, str]:
    """Links to MLflow's pages about a version, if a server has them."""
    server = stores.uri().rstrip("/")
    if not server.startswith("http"):
        return {}
    run = stores.client().get_run(version.run).info
    pages = stores.public(server)
    return {
        "MLflow run": f"{pages}/#/experiments/{run.experiment_id}/runs/{version.run}",
        "model version": f"{pages}/#/models/{version.name}/versions/{version.version}",
    }


def _sheet(file: Path) -> str:
    """A contact sheet as Markdown with the embedded picture."""
    if not file.is_file():
        return ""
    picture, held = Image.open(file).convert("RGB"), io.BytesIO()
    picture.thumbnail((_SHEET, _SHEET))
    picture.save(held, "JPEG", quality=80)
    return f"![{relative(file)}](data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()})"


def _markdown(what: str, about: str, *paragraphs: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact("\n\n".join(paragraphs), key=_key(what), description=about)


def _table(what: str, about: str, rows: list[dict[str, Any]]) -> None:
    from prefect.artifacts import create_table_artifact

    create_table_artifact(rows, key=_key(what), description=about)


def _link(what: str, link: str) -> None:
    from prefect.artifacts import create_link_artifact

    create_link_artifact(link, link_text=link, key=_key(what), description=link)


def _key(what: str) -> str:
    """An artifact key per recipe (the flow run's name), since Prefect keeps one history per key."""
    from prefect.runtime import flow_run

    return re.sub(r"[^a-z0-9]+", "-", f"{flow_run.name} {what}".lower()).strip("-")
