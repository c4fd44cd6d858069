"""The check of ONNX export."""

from __future__ import annotations

from kshot.data.episodes import Shape
from kshot.testing.subject import SIDE, Subject, toy_images
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import Plugin


def onnx_agrees_with_torch(subject: Subject) -> None:
    """The learner exports to ONNX, inner loops included, and the bundle agrees with torch at any size."""
    from kshot.export import Facts, export  # importing onnx takes a second

    learner = subject.build()
    facts = Facts(
        learner=Plugin(name=subject.name, config=learner.config.model_dump(mode="json")),
        backbone=Plugin(name="conv4", config=subject.recipe.backbone.options),
        image=ImageRule(size=SIDE, channels=1),
    )
    report = export(
        learner, subject.folder / "bundle", facts=facts, data=toy_images(), shape=Shape(5, 1, 9), seed=0, episodes=45
    )
    found = report.manifest.parity
    assert found.agreement >= 0.999, f"ONNX and torch agree on only {100 * found.agreement:.2f} % of the queries"
