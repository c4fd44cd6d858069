"""The hooks of the plugin interface. docs/plugins.md documents each of them, which a test checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from kshot.backbones import Backbone
    from kshot.data.sources import Importer
    from kshot.learner import Learner

_Function = TypeVar("_Function", bound=Callable[..., Any])

hookspec = pluggy.HookspecMarker("kshot")
_hookimpl = pluggy.HookimplMarker("kshot")


def hookimpl(function: _Function) -> _Function:
    """Mark a function as the plugin's implementation of the hook of the same name."""
    return _hookimpl(function)


@hookspec
def kshot_learners() -> Sequence[type[Learner]]:  # type: ignore[empty-body]  # a specification has no body
    """Algorithms: subclasses of `kshot.Learner`, each with a unique name."""


@hookspec
def kshot_backbones() -> Mapping[str, type[Backbone]]:  # type: ignore[empty-body]  # likewise
    """Backbones by name: subclasses of `kshot.Backbone`. A class under "x/*" provides "x/NAME" by `named(NAME)`."""


@hookspec
def kshot_datasets() -> Mapping[str, Importer]:  # type: ignore[empty-body]  # likewise
    """Data sources by name: `kshot.data.sources.Importer`, which list images and define how to pack them."""
