"""Few-shot image classification: the whole vocabulary of a plugin's author. kshot's own plugins import nothing else.

>>> from kshot import FeatureLearner, LearnerConfig, State, class_means, hookimpl
"""

import kshot_runtime  # noqa: F401  (first: it switches onnxruntime's telemetry off)
from kshot.backbones import Backbone, BackboneConfig, PretrainedBackbone, Resize, pool, spread
from kshot.data.datasets import Skipped
from kshot.data.episodes import Episode, Episodes, Shape
from kshot.data.sources import Importer, Listing, Picture, Request, Split, list_images, random_split
from kshot.gradients import gradient, value_and_gradient
from kshot.hookspecs import hookimpl
from kshot.learner import (
    FeatureLearner,
    FeatureLoop,
    InnerLoop,
    Learner,
    LearnerConfig,
    State,
    without_statistics,
)
from kshot.norms import BY_ITSELF, Norm, SupportNorm, convolve, make_norm
from kshot.ops import channels_last, class_means, cross_entropy, one_hot, solve, squared_distances, unit
from kshot.recurrence import bidirectional_lstm
from kshot.torchvision_import import torchvision
from kshot_runtime.errors import KshotError
from kshot_runtime.images import ImageRule

__all__ = [
    "BY_ITSELF",
    "Backbone",
    "BackboneConfig",
    "Episode",
    "Episodes",
    "FeatureLearner",
    "FeatureLoop",
    "ImageRule",
    "Importer",
    "InnerLoop",
    "KshotError",
    "Learner",
    "LearnerConfig",
    "Listing",
    "Norm",
    "Picture",
    "PretrainedBackbone",
    "Request",
    "Resize",
    "Shape",
    "Skipped",
    "Split",
    "State",
    "SupportNorm",
    "bidirectional_lstm",
    "channels_last",
    "class_means",
    "convolve",
    "cross_entropy",
    "gradient",
    "hookimpl",
    "list_images",
    "make_norm",
    "one_hot",
    "pool",
    "random_split",
    "solve",
    "spread",
    "squared_distances",
    "torchvision",
    "unit",
    "value_and_gradient",
    "without_statistics",
]
