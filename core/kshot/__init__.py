"""Few-shot image classification: all that the author of an algorithm needs to import.

from kshot import InnerLoop, Learner, LearnerConfig, State, gradient, hookimpl
"""

import kshot_runtime  # noqa: F401  (first: it switches onnxruntime's telemetry off)
from kshot.backbones import Backbone
from kshot.episodes import Episode, Episodes, Shape
from kshot.gradients import gradient
from kshot.hookspecs import hookimpl
from kshot.learner import InnerLoop, Learner, LearnerConfig, State, cross_entropy, one_hot
from kshot_runtime.errors import KshotError

__all__ = [
    "Backbone",
    "Episode",
    "Episodes",
    "InnerLoop",
    "KshotError",
    "Learner",
    "LearnerConfig",
    "Shape",
    "State",
    "cross_entropy",
    "gradient",
    "hookimpl",
    "one_hot",
]
