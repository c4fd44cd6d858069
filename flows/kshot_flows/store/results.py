"""Stores and reuses results of tasks: small files under `.kshot/steps`, named by content keys.

A result names files, which are verified before it is reused; if any is missing or changed, the task runs again.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, get_args

from pydantic import TypeAdapter
from rich.markup import escape

from kshot_flows import project
from kshot_flows.console import profiling, progress
from kshot_flows.store.products import Product
from kshot_flows.tracking import stores

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

P = ParamSpec("P")
R = TypeVar("R", bound=Product)


@dataclass(frozen=True)
class Done:
    """A finished task."""

    step: str
    product: Product
    reused: bool
    seconds: float


_journal: ContextVar[list[Done]] = ContextVar("journal")
_recalling: ContextVar[bool] = ContextVar("recalling", default=False)


class _NothingKept(Exception):  # noqa: N818  (no error)
    """A task has no reusable result."""


@contextmanager
def journal() -> Iterator[list[Done]]:
    """Collect the tasks that finish inside the block, in order."""
    done: list[Done] = []
    token = _journal.set(done)
    try:
        yield done
    finally:
        _journal.reset(token)


@dataclass(frozen=True)
class Step(Generic[P, R]):
    """A function that runs as a Prefect task, whose result is reused for equal `key` of its arguments.

    Results are stored per project. Of two processes with the same key, one runs and the other waits for its result.
    """

    fn: Callable[P, R]  # the function itself, without Prefect
    key: Callable[P, str]
    shows: Callable[[Any], None]
    assets: Callable[P, list[str]] | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.fn.__name__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        began, again, key = time.monotonic(), _recalling.get(), self.key(*args, **kwargs)
        if again:
            product: R = _recall(key)
        else:
            progress.say(f"[bold]{self.name}[/bold]")
            with profiling.measured(self.name):
                product, again = _run(self, key, *args, **kwargs)
                self.shows(product)
        if (done := _journal.get(None)) is not None:
            done.append(Done(self.name, product, again, time.monotonic() - began))
        return product


def _run(step: Step[P, R], key: str, *args: P.args, **kwargs: P.kwargs) -> tuple[R, bool]:
    """Run a step as a locked, cached Prefect task; returns the product, and whether it was reused."""
    import prefect  # imported here, since it takes a second and an unchanged run does not need it
    from prefect.assets import materialize
    from prefect.cache_policies import CacheKeyFnPolicy
    from prefect.transactions import IsolationLevel

    from kshot_flows.store.locks import ProcessLocks

    discard_unusable(key)  # computed here, because Prefect ignores errors in a key function and runs without a cache
    policy = CacheKeyFnPolicy(
        cache_key_fn=lambda *_: key,
        isolation_level=IsolationLevel.SERIALIZABLE,
        lock_manager=ProcessLocks(project.home() / ".kshot" / "locks"),
    )
    options = {**step.options, "cache_policy": policy, "result_storage": folder(), "result_serializer": "json"}
    decorate = materialize(*step.assets(*args, **kwargs), **options) if step.assets else prefect.task(**options)
    state = decorate(step.fn)(*args, return_state=True, **kwargs)
    if state.name == "Cached":
        progress.say("  nothing has changed: the earlier result is used again")
    return state.result(), state.name == "Cached"


def task(
    key: Callable[P, str],
    *,
    shows: Callable[[Any], None] = lambda product: None,
    assets: Callable[P, list[str]] | None = None,
    **options: Any,
) -> Callable[[Callable[P, R]], Step[P, R]]:
    """Prefect's `@task` with its options; its result is reused for equal `key` of its arguments.

    `shows` publishes the result, which may be an earlier one, on the run's page. `assets` names what the task makes,
    and so Prefect tells who waits for these assets.
    """
    return lambda function: Step(function, key, shows, assets, options)


def transient(made: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a retry may help, since a service did not answer; for a task's `retry_condition_fn`."""
    from mlflow.exceptions import MlflowException

    from kshot_flows.registry import UnsettledError

    error = state.result(raise_on_failure=False)
    full = getattr(error, "errno", None) == errno.ENOSPC
    again = isinstance(error, OSError | MlflowException | UnsettledError) and not full
    if again:
        progress.say(escape(f"  {made.name}: {stores.reason(error)}; trying again"))
    return again


RETRIED: Mapping[str, Any] = {"retries": 2, "retry_delay_seconds": [5, 30], "retry_condition_fn": transient}
"""Options for a task whose failures may pass by themselves."""


def recalled(pipeline: Callable[[], object]) -> list[Done] | None:
    """The results of a flow's tasks if all can be reused; None if any task must run.

    Uses the keys and the store of a real run, without importing Prefect, which takes longer than the lookup.
    """
    token = _recalling.set(True)
    try:
        with journal() as done:
            pipeline()
        return done
    except _NothingKept:
        return None
    finally:
        _recalling.reset(token)


def recalling() -> bool:
    """Whether a `recalled` flow is running, which prints nothing because it may be abandoned."""
    return _recalling.get()


def folder() -> Path:
    return project.home() / ".kshot" / "steps"


def usable(key: str) -> bool:
    """Whether the stored result of a key can be reused."""
    try:
        _recall(key)
    except _NothingKept:
        return False
    return True


def discard_unusable(key: str) -> None:
    """Remove the stored result of a key if it cannot be reused, since Prefect would use it unverified."""
    if not usable(key):
        (folder() / key).unlink(missing_ok=True)


def _recall(key: str) -> Any:
    """The stored result of a key, if its files still exist unchanged."""
    if not (folder() / key).exists():
        raise _NothingKept
    try:
        held = json.loads(json.loads((folder() / key).read_text())["result"])
        product = TypeAdapter(_PRODUCTS[held["__class__"]]).validate_python(held["data"])
    except (KeyError, TypeError, ValueError):  # truncated, or written by another version of kshot
        raise _NothingKept from None
    if not product.intact():  # an error here, such as of the registry, does not mean that the result is invalid
        raise _NothingKept
    return product


_PRODUCTS = {
    f"{kind.__module__}.{kind.__qualname__}": kind for kind in get_args(Product)
}  # the names in Prefect's JSON
