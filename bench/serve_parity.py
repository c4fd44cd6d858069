"""Answers over HTTP against torch's evaluation: the same test episodes, from the original image files.

    python bench/serve_parity.py data/omniglot ORIGINALS --run runs/omniglot-protonet/KEY [--episodes 100] [--ways 5 20]
    python bench/serve_parity.py data/mini-imagenet ORIGINALS --episodes 50 --ways 5 --queries 15

DATA is a data set as `kshot data import` packs it, ORIGINALS a folder with the archives that it was imported from. An
episode's support images are uploaded as original files to the classes of a label space; its queries are classified
there. torch uses the packed images, as in every evaluation. --run is the folder of a training, with its learner and its
bundle; without it an untrained ProtoNet on conv4 is compared with its own export. Exits with 1 if a target is missed.
Adds to bench/results/serve_parity.json.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_load import RESULTS, add, arguments, bar, serving, write

from kshot.data.datasets import ClassImages, ImageSet
from kshot.data.episodes import Shape, draw_indices
from kshot.evaluation.scores import answers
from kshot.export import Facts, export
from kshot.learner import Learner
from kshot.recipe import LearnerSettings, PluginSettings, Recipe
from kshot_client import Client
from kshot_flows.store import learners
from kshot_flows.store.keys import TEST_SEED
from kshot_runtime.images import decode
from kshot_runtime.manifest import MANIFEST, Plugin

NAME = "serve_parity"
AT_ONCE = 8  # episodes that an evaluation draws together
UPLOAD = 32  # maximal photos per request
POINTS = 0.1


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("originals", type=Path, metavar="ORIGINALS")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--ways", type=int, nargs="+", default=[5])
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--queries", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageSet.open(options.data)
    shapes = [Shape(ways, options.shots, options.queries) for ways in options.ways]
    with tempfile.TemporaryDirectory() as scratch:
        learner, bundle = trained(options.run) if options.run else untrained(data, Path(scratch) / "bundle")
        files = Originals(data, options.originals)
        with serving(bundle, Path(scratch) / "serve") as served, served.client() as client:
            rows = [compare(learner, data, files, shape, options.episodes, client) for shape in shapes]
    key = f"{data.name}, {learner.name}, {'trained' if options.run else 'untrained'}"
    return 0 if keep(key, {"episodes": options.episodes, "rows": rows}) else 1


def trained(run: Path) -> tuple[Learner, Path]:
    [bundle] = sorted(run.glob(f"bundle-*/{MANIFEST}"))[-1:] or [None]
    if bundle is None:
        raise SystemExit(f"{run} has no bundle: `kshot run` makes one after the training")
    return learners.load(run / "learner.pt"), bundle.parent


def untrained(data: ImageSet, folder: Path) -> tuple[Learner, Path]:
    torch.manual_seed(0)
    recipe = Recipe(
        name="parity", dataset={"name": data.name}, backbone=PluginSettings(name="conv4"),
        learner=LearnerSettings(name="protonet"),
    )  # fmt: skip
    learner = recipe.build(data.rule.shape).eval()
    facts = Facts(learner=Plugin(name="protonet"), backbone=Plugin(name="conv4"), image=data.rule)
    export(learner, folder, facts=facts, data=data.split("test"), shape=Shape(5, 1, 3), seed=1, episodes=10)
    return learner, folder


class Originals:
    """The files that the test classes of a data set were imported from, found in the archives by their hashes."""

    def __init__(self, data: ImageSet, folder: Path) -> None:
        self._classes = [entry for entry in data.classes if entry.split == "test"]
        self._files = data.index.files
        self._data = data
        needed = {file.sha256 for entry in self._classes for file in self._files[entry.start :][: entry.count]}
        self._content: dict[str, bytes] = {}
        for archive in sorted(folder.glob("*.zip")):
            with zipfile.ZipFile(archive) as members:
                for name in members.namelist():
                    content = members.read(name)
                    if (digest := hashlib.sha256(content).hexdigest()) in needed:
                        self._content[digest] = content
        if missing := needed - self._content.keys():
            raise SystemExit(f"{len(missing)} of {len(needed)} files of {data.name} are in no zip of {folder}")

    def __call__(self, klass: int, sample: int) -> bytes:
        at = self._classes[klass].start + sample
        content = self._content[self._files[at].sha256]
        if not np.array_equal(decode(content, self._data.rule), self._data.images[at]):
            raise SystemExit(f"{self._files[at].name} is decoded otherwise than at its import")
        return content


def compare(
    learner: Learner, data: ImageSet, files: Originals, shape: Shape, episodes: int, client: Client
) -> dict[str, Any]:
    """Evaluate each episode with both; without rotations, since original files are uploaded."""
    images = data.split("test")
    by_torch = answers(learner, images, shape, episodes, seed=TEST_SEED)
    began, right, agree = time.perf_counter(), [], []
    for (classes, samples), (episode, logits) in zip(draws(images, shape, episodes), by_torch, strict=True):
        assert np.array_equal(classes, episode.source.numpy())
        photos = [[files(klass, each) for each in row] for klass, row in zip(classes, samples, strict=True)]
        support, query = [row[: shape.shots] for row in photos], [row[shape.shots :] for row in photos]
        over_http = ask(client, support, [photo for row in query for photo in row])
        truth, here = episode.query_labels.numpy(), logits.argmax(1).numpy()
        right.append([(over_http == truth).mean(), (here == truth).mean()])
        agree.append((over_http == here).mean())
    http, torchs = (100 * np.mean(right, axis=0)).tolist()
    return {
        "shape": str(shape),
        "http": round(http, 3),
        "torch": round(torchs, 3),
        "agreement": round(float(np.mean(agree)), 5),
        "seconds": round(time.perf_counter() - began),
    }


def draws(images: ClassImages, shape: Shape, episodes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The classes (ways,) and images (ways, shots + queries) of each episode of an evaluation."""
    for step in range(math.ceil(episodes / AT_ONCE)):
        batch = draw_indices(images, shape, AT_ONCE, seed=TEST_SEED, step=step, stream="test")
        yield from itertools.islice(zip(*batch, strict=True), episodes - step * AT_ONCE)


def ask(client: Client, support: list[list[bytes]], query: list[bytes]) -> np.ndarray:
    """The index of the most probable class for each query, from a new label space on the server."""
    space = client.call("POST", "/v1/spaces", json={"name": "episode"}).json()["id"]
    for label, photos in enumerate(support):
        add(client, space, str(label), photos)
    found = []
    for start in range(0, len(query), UPLOAD):
        files = [("photos", ("photo", each)) for each in query[start : start + UPLOAD]]
        results = client.call("POST", f"/v1/spaces/{space}/classify", files=files).json()["results"]
        found += [int(result["classes"][0]["name"]) for result in results]
    client.call("DELETE", f"/v1/spaces/{space}")
    return np.array(found)


def keep(key: str, found: dict[str, Any]) -> bool:
    """Save this comparison with the others; returns whether it meets all targets."""
    for row in found["rows"]:
        apart = round(abs(row["http"] - row["torch"]), 3)
        print(f"{key}, {row['shape']}: {row['http']:.2f} % over HTTP, {row['torch']:.2f} % by torch; "
              f"{100 * row['agreement']:.2f} % of answers agree; {row['seconds']} s")  # fmt: skip
        row["bar"] = bar("accuracies differ by", apart, POINTS, apart <= POINTS, "points")
    file = RESULTS / f"{NAME}.json"
    before = json.loads(file.read_text())["compared"] if file.exists() else {}
    what = "test episodes answered over HTTP, from the original files, and by torch's evaluation"
    write(NAME, {"what": what, "compared": before | {key: found}}, "torch", "pillow")
    return all(row["bar"]["met"] for row in found["rows"])


if __name__ == "__main__":
    raise SystemExit(main())
