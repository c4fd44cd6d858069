"""The report of a run (one self-contained HTML file) and the model card of its version (Markdown)."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kshot.evaluation.statistics import interval
from kshot_flows.console.tables import trust
from kshot_flows.store.products import Exported, Promotion, Scores, relative
from kshot_flows.tracking import runs
from kshot_runtime.manifest import MANIFEST, Manifest

if TYPE_CHECKING:
    from jinja2 import Environment

    from kshot.recipe import Recipe
    from kshot_flows.registry.gate import GateReport

_LOADING = """\
import mlflow, pandas as pd
from pathlib import Path

model = mlflow.pyfunc.load_model("models:/{name}@production")
photos = pd.DataFrame({{"image": [Path("cat.jpg"), Path("dog.jpg"), Path("new.jpg")], "label": ["cat", "dog", None]}})
print(model.predict(photos))  # class, probability and unknown of each photo without a label
"""
REPORT, CARD = "report.html", "card.md"
_OPEN, _CLOSE = "<!--gate-->", "<!--/gate-->"  # markers in a report around the verdict, which is added later


def facts(recipe: Recipe, scores: Scores, bundle: Exported, run: runs.Run) -> dict[str, Any]:
    """The variables of both templates."""
    about = Manifest.model_validate_json((bundle.folder / MANIFEST).read_bytes())
    tags = run.client.get_run(run.id).data.tags
    changed = " + changes (git.diff in the MLflow run)" if tags.get("kshot.git.dirty") == "true" else ""
    commit = tags.get("mlflow.source.git.commit")
    lineage = {
        "git commit": commit and commit + changed,
        "recipe": f"{recipe.name}, seed {recipe.seed}",
        "MLflow run": run.id,
        "Prefect run": tags.get("kshot.prefect.flow_run"),
        "bundle": f"{relative(bundle.folder)}, id {about.id}",
        "learner.pt (sha256)": scores.learner.learner.sha256,
        "made by": f"kshot {version('kshot')}, torch {version('torch')}",
    }
    cosine = scores.cosine()
    return {
        "recipe": recipe,
        "scores": scores,
        "about": about,
        "bundle": bundle,
        "cosine": None if cosine is None else interval(cosine),
        "training": _training(scores),
        "unknown": _unknown(scores),
        "limits": list(_limits(scores, about)),
        "data": [(ref, _uses(recipe, scores, ref.name)) for ref in scores.data.refs(recipe.dataset)],
        "lineage": {name: value for name, value in lineage.items() if value},
        "loading": _LOADING.format(name=recipe.name),
        "settings": runs.flatten(recipe.model_dump(mode="json")),
    }


def card(known: Mapping[str, Any]) -> str:
    """The model card, for the version's page in MLflow."""
    return _templates().get_template("card.md.jinja").render(known)


def html(known: Mapping[str, Any], pictures: Mapping[str, bytes], number: int) -> str:
    """The HTML report of a version, with embedded pictures."""
    inlined = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pictures.items()}
    episodes = [name for name in inlined if name.startswith("episodes-")]
    return (
        _templates()
        .get_template("report.html.jinja")
        .render(known, pictures=inlined, episodes=episodes, version=number, gate=None, promotion=None)
    )


def add_verdict(report: Path, promotion: Promotion, gate: GateReport | None) -> bool:
    """Add the gate's verdict to a report; False if the report is missing or now belongs to another version."""
    text = report.read_text() if report.is_file() else ""
    if f"<title>{promotion.name} version {promotion.version}</title>" not in text:
        return False
    before, _, rest = text.partition(_OPEN)
    _, _, after = rest.partition(_CLOSE)
    verdict = _templates().get_template("gate.html.jinja").render(promotion=promotion, gate=gate)
    report.write_text(f"{before}{_OPEN}{verdict}{_CLOSE}{after}")
    return True


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=PackageLoader("kshot_flows.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html.jinja"]),
    )  # fmt: skip
    made.filters |= {"share": _share, "score": _score, "cell": _cell}
    made.globals |= {"trust": trust}
    return made


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def _score(pair: tuple[float, float]) -> str:
    accuracy, margin = pair
    return f"{100 * accuracy:.2f} ± {100 * margin:.2f} %"


def _cell(text: object) -> str:
    """Text for a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _training(scores: Scores) -> str:
    learner = scores.learner
    if learner.steps:
        return f"meta-trained on {scores.data.name}, weights of step {learner.best_step} of {learner.steps}"
    if learner.tried:
        return f"chosen among {len(learner.tried)} heads by cross-validation over the classes of {scores.data.name}"
    return "taken as it was built"


def _unknown(scores: Scores) -> str | None:
    """Both error rates of rejecting unknown photos, as text."""
    line, found = scores.lines[0], scores.lines[0].open_set
    if found is None:
        return None
    return (
        f"Measured on test classes, {line.shape.ways}-way {line.shape.shots}-shot, at the default threshold: of photos "
        f"that show one of the classes {_share(1 - found.accepted)} are wrongly refused as unknown, and of photos that "
        f"show none of them {_share(found.false_accepts)} are wrongly let in (AUROC {_share(found.auroc)}). "
        "The threshold moves with `accept`, the share of known photos that is to pass: more of them, and more unknown "
        "ones are let in."
    )


def _uses(recipe: Recipe, scores: Scores, name: str) -> str:
    """The uses of each split of a data set in a recipe."""
    named = {role: getattr(recipe.dataset, role) for role in ("train", "validation", "unlabelled", "test")}
    parts = [(role, part) for role, splits in named.items() if splits for part in scores.data.parts(splits)]
    return ", ".join(f"{role}: {splits}" for role, (packed, splits) in parts if packed.name == name)


def _limits(scores: Scores, about: Manifest) -> Iterator[str]:
    image, most, first = about.image, about.limits, scores.lines[0]
    colours = "colour" if image.channels == 3 else "grey"
    yield f"Photos are seen at {image.size} x {image.size} pixels in {colours} ({image.fit})."
    yield f"At most {most.ways} classes, {most.shots} photos of a class and {most.support} photos in all."
    yield (
        f"The figures hold for classes like the tested ones ({scores.split}), episodes drawn as {first.protocol}. "
        "For other photos, measure again."
    )
    if first.protocol.startswith("random photos"):
        yield "Support and queries were not kept apart by day, place or camera: expect less where these change."
    if first.episodes < 300:
        yield f"Measured on {first.episodes} episodes only, which the wide interval tells."
    if not scores.calibrations:
        yield "There were no validation classes: probabilities are not calibrated, and nothing is ever unknown."
