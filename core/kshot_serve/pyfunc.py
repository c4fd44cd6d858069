"""A bundle as an MLflow model: a table of photos in, some with the label of their class, and a row for each other out.

`mlflow.pyfunc` imports this module by the name that the MLmodel file of every registered version holds: it must stay.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kshot_runtime.bundle import Bundle, Photo
from kshot_runtime.errors import KshotError
from kshot_serve.spaces.decisions import by_features, judge, similarity

if TYPE_CHECKING:
    from pandas import DataFrame


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> FewShotModel:
    """The model in a folder. MLflow calls it, with a `model_config` of arguments to `Bundle.open`: device, threads."""
    return FewShotModel(Bundle.open(path, **(model_config or {})))


class FewShotModel:
    """Adapts to the labelled photos of a table and classifies the others; no state is kept between calls."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def predict(self, photos: DataFrame, params: Mapping[str, Any] | None = None) -> DataFrame:
        """For each photo without a label its `class`, the `probability`, and whether it is `unknown`.

        An `image` is an encoded photo (bytes, or their base64), a pathlib.Path, or uint8 (C, H, W). Of `params`,
        `accept` is the share of known photos that is to pass the threshold.
        """
        try:
            return self._predict(photos, (params or {}).get("accept"))
        except KshotError as error:
            from mlflow.exceptions import MlflowException  # whose message MLflow's server passes on

            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _predict(self, photos: DataFrame, accept: float | None) -> DataFrame:
        bundle, manifest = self._bundle, self._bundle.manifest
        images = [_photo(image) for image in photos["image"]]
        labels = ["" if label is None or label != label else str(label) for label in photos.get("label", [])]
        labels = labels or [""] * len(images)
        if not any(labels) or all(labels):
            raise KshotError(
                f"{sum(map(bool, labels))} of {len(labels)} photos have a label: give one to the photos of each class, "
                "as many as you like, and none (null or '') to those that are to be classified"
            )
        support = [image for image, label in zip(images, labels, strict=True) if label]
        state = bundle.adapt(support, [label for label in labels if label])
        queries = bundle.images([image for image, label in zip(images, labels, strict=True) if not label])
        alike = None
        if by_features(manifest.verification, len(state.classes)) and manifest.verification is not None:
            known = bundle.graphs.embed_support(bundle.images(support))
            alike = similarity(manifest.verification, bundle.graphs.embed(queries), known).max(1)
        calibration = manifest.calibration_for(len(state.classes), float(np.mean(state.counts)))
        outputs = bundle.outputs(state.tensors, queries)
        found = judge(outputs, calibration, manifest.verification, accept, alike)
        answers = photos.loc[[not label for label in labels], []].copy()
        answers["class"] = [state.classes[i] for i in found.probabilities.argmax(1)]
        answers["probability"] = found.probabilities.max(1).astype(float)
        answers["unknown"] = [decision == "unknown" for decision in found.decisions]
        return answers


def _photo(image: Any) -> Photo:
    """A cell of the table as a bundle takes it. Text is never taken for a path: it may come over HTTP."""
    if isinstance(image, (Path, np.ndarray)) or (isinstance(image, bytes) and not image.isascii()):
        return image
    try:
        return base64.b64decode(b"".join((image.encode() if isinstance(image, str) else image).split()), validate=True)
    except (AttributeError, TypeError, ValueError):
        raise KshotError(
            f"an image is bytes (or base64) of a photo, a pathlib.Path or uint8 (C, H, W); not {repr(image)[:60]}"
        ) from None
