"""Register and promote, killed at any call of MLflow's client or copy of a file, and what the next command leaves.

A script by itself. Everything is imported once, and each piece of work happens in a fork, where a kill costs little.
"""

import functools
import gc
import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (so that a fork need not)
from mlflow import MlflowClient

from kshot_flows import recipes, registry
from kshot_flows.report import experiment, pictures  # noqa: F401  (pictures: so that a fork need not)
from kshot_flows.store.products import Pin
from kshot_flows.tasks.data import version_data
from kshot_flows.tasks.evaluate import evaluate
from kshot_flows.tasks.export import export
from kshot_flows.tasks.promote import promote
from kshot_flows.tasks.register import register
from kshot_flows.tasks.train import meta_train
from kshot_flows.tracking import stores
from kshot_serve.models.registry import Registry

TEMPLATE, SCRATCH, POINTS = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
CALLS = [name for name in vars(MlflowClient) if not name.startswith("_") and callable(getattr(MlflowClient, name))]


def in_a_fork(home: Path, work: Callable[[], Any]) -> Any:
    """What the work returns, or None if it was killed."""
    answer = SCRATCH / "answer.json"
    answer.unlink(missing_ok=True)
    gc.freeze()
    if not (child := os.fork()):
        os.environ["KSHOT_HOME"] = str(home)
        os.chdir(home)
        try:
            answer.write_text(json.dumps(work()))
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert os.waitstatus_to_exitcode(status) == 0
    return json.loads(answer.read_text())


def prepare() -> None:
    """What is registered as versions 1 and 2: a trained and exported learner, and the same with another bundle.json."""
    recipe = recipes.load(str(TEMPLATE / "tiny.toml"), [])
    data = version_data.fn(recipe)
    learner = meta_train.fn(recipe, data)
    score = evaluate.fn(recipe, data, learner)
    first = export.fn(recipe, learner, score)
    folder = Path(shutil.copytree(first.folder, f"{first.folder}-2"))
    (folder / "bundle.json").write_text(json.dumps(json.loads((folder / "bundle.json").read_text())))
    second = replace(first, files=tuple(Pin.of(folder / pin.file.name) for pin in first.files))
    (TEMPLATE / "made.pickle").write_bytes(pickle.dumps([(recipe, data, score, each) for each in (first, second)]))


def run(which: int) -> dict[str, Any]:
    """The last two steps of a pipeline run."""
    recipe, data, score, bundle = pickle.loads((Path.cwd() / "made.pickle").read_bytes())[which]
    version = register.fn(recipe, data, score, bundle)
    promotion = promote.fn(recipe, version)
    return {"version": promotion.version, "stage": str(promotion.stage), "champion": promotion.champion}


def counted(which: int, last: int = -1, after: bool = True) -> list[str]:
    """Run, and be killed before or after the call with the number `last`. Returns the calls."""
    calls: list[str] = []

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            mine = len(calls) - 1 == last
            if mine and not after:
                if name == "copyfile":  # cut off in the middle
                    Path(args[1]).write_bytes(Path(args[0]).read_bytes()[:100])
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counting

    for place, name in [(shutil, "copyfile"), *((MlflowClient, name) for name in CALLS)]:
        setattr(place, name, wrapped(name, getattr(place, name)))
    run(which)
    return calls


def next_command(which: int, look_first: bool) -> dict[str, Any]:
    """`kshot run`, sometimes after `kshot models`, and what they leave."""
    agreed = []
    if look_first and "tiny" in registry.models():
        registry.settle("tiny")
        agreed.append(registry.disagreements("tiny"))
    promotion = run(which)
    agreed.append(registry.disagreements("tiny"))
    door, moves, versions = stores.client(), registry.history("tiny"), registry.versions("tiny")
    experiment = door.get_experiment_by_name("tiny").experiment_id
    champion = registry.champion("tiny")
    return {
        "stage": promotion["stage"],
        "disagreements": [sentence for sentences in agreed for sentence in sentences],
        "champion": champion,
        "in production": [
            int(one.version)
            for one in door.search_model_versions("name='tiny'")
            if one.current_stage == one.tags["stage"] == "Production"
        ],
        "served": int(Registry("models:/tiny@production", stores.uri()).find().number),
        "versions": [version.version for version in versions],
        "bundles": len({version.tags["bundle"] for version in versions}),
        "runs": sorted({one.info.status for one in door.search_runs([experiment])}),
        "logged models": [str(one.status) for one in door.search_logged_models([experiment])],
        "judged against itself": [str(move) for move in moves if f"against version {move.version}" in move.why],
        "adopted": [str(move) for move in moves if move.adopted],
    }


def main() -> None:
    in_a_fork(TEMPLATE, prepare)
    experiment._figures = lambda *_: iter(())  # drawing takes longer than all the rest
    champion, copy = SCRATCH / "champion", SCRATCH / "copy"
    shutil.copytree(TEMPLATE, champion)
    in_a_fork(champion, lambda: run(0))
    calls: dict[int, list[str]] = {}
    for which, before in enumerate((TEMPLATE, champion)):
        shutil.copytree(before, copy)
        calls[which] = in_a_fork(copy, partial(counted, which))
        shutil.rmtree(copy)
    points = [(which, call) for which in calls for call in range(len(calls[which]))]
    random.shuffle(points)
    for which, call in points[: POINTS or None]:
        shutil.copytree(champion if which else TEMPLATE, copy)
        after = random.random() < 0.5
        # Metrics are sent by time too, so there may be fewer calls; then the run has ended.
        in_a_fork(copy, partial(counted, which, call, after))
        left = in_a_fork(copy, partial(next_command, which, random.random() < 0.5))
        killed = f"{'after' if after else 'before'} call {call}, {calls[which][call]}, of version {which + 1}"
        print(json.dumps({"killed": killed, "made": which + 1, **left}), flush=True)
        shutil.rmtree(copy)


if __name__ == "__main__":
    main()
