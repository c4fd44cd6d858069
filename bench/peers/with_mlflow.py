"""The model that `mlflow models serve` serves for bench/serve_throughput.py: a pyfunc around a bundle and a state."""

from __future__ import annotations

import base64
from typing import Any

import mlflow

from kshot_runtime.bundle import Bundle, State


class Photos(mlflow.pyfunc.PythonModel):
    """Photos in base64 in, names out; all photos of a request in one run."""

    def load_context(self, context: Any) -> None:
        threads = context.model_config["threads"]
        self.bundle = Bundle.open(context.artifacts["bundle"], threads=threads, arena=True)
        self.state = State.load(context.artifacts["state"])

    def predict(self, context: Any, model_input: list[str], params: Any = None) -> list[str]:
        photos = [base64.b64decode(photo) for photo in model_input]
        return self.bundle.classify(self.state, photos).names


mlflow.models.set_model(Photos())
