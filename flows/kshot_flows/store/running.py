"""Run a step as a Prefect task: under its lock, with its result kept under its key."""

from __future__ import annotations

from typing import ParamSpec, TypeVar

import prefect
from prefect.assets import materialize
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.transactions import IsolationLevel

from kshot_flows import project
from kshot_flows.console import progress
from kshot_flows.store.locks import ProcessLocks
from kshot_flows.store.products import Product
from kshot_flows.store.results import Step, discard_unusable, folder

P = ParamSpec("P")
R = TypeVar("R", bound=Product)


def run(step: Step[P, R], key: str, *args: P.args, **kwargs: P.kwargs) -> tuple[R, bool]:
    """The step's product, and whether it is an earlier one."""
    discard_unusable(key)  # now, because Prefect takes an error in a key function for leave to use no result
    policy = CacheKeyFnPolicy(
        cache_key_fn=lambda *_: key,
        isolation_level=IsolationLevel.SERIALIZABLE,
        lock_manager=ProcessLocks(project.home() / ".kshot" / "locks"),
    )
    options = {**step.options, "cache_policy": policy, "result_storage": folder(), "result_serializer": "json"}
    decorate = materialize(*step.assets(*args, **kwargs), **options) if step.assets else prefect.task(**options)
    task = decorate(step.fn)
    state = task(*args, return_state=True, **kwargs)
    if state.name == "Cached":
        progress.say("  nothing has changed: the earlier result is used again")
    return state.result(), state.name == "Cached"
