"""Compare kshot with scikit-learn, easyfsl, fine-tuning and others on the same episodes of photos.

    python bench/photos_vs_peers.py DATA [fruit coins emoji-4v] [--cache DIR] [--episodes 300] [--tuned 8]
    python bench/photos_vs_peers.py DATA --report

DATA and the cache are those of bench/photo_heads.py, which has to run first: kshot's head is the one selected there on
the base classes. The peers get the same episodes of the same backbone's last features in a file, and are installed into
a separate environment, cache/peers, by `python -m venv` and `pip install scikit-learn easyfsl` (some GB with torch).
Each is used as documented; its score for unknown is the largest probability. The backbone that is fine-tuned for each
episode takes so long that it gets only the first few episodes. kshot and the peers alternate, episode by episode;
seconds are CPU time of one thread, medians. Writes bench/results/photos_vs_peers.json and its part of
docs/photographs.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "photos_vs_peers.json"
PARTS = {"peers": slice(None), "tuned-small": slice(1), "tuned-large": slice(1, None)}
"""What is measured apart, and on which sizes of episode."""
PEERS = ("scikit-learn", "easyfsl")
TRANSDUCTIVE = ("easyfsl BD-CSPN", "easyfsl TIM")
LATE = (*TRANSDUCTIVE, "easyfsl Finetune")  # these learn at query time, so their seconds include classification
Classify = Callable[[np.ndarray], np.ndarray]
"""Probabilities (N, W) of features (N, D)."""


# ---- in the environment of the peers: no kshot here


def answer(file: Path) -> None:
    """Evaluate episodes of a file, one per line of standard input."""
    import torch

    torch.set_num_threads(1)
    held, found = np.load(file), {}
    features = held["features"]
    methods = peers(held["centre"])
    for line in sys.stdin:
        number = int(line)
        draw = {part: held[f"{number}-{part}"] for part in ("support", "labels", "queries", "unknown")}
        for name, fit in methods.items():
            torch.manual_seed(number)
            began = time.process_time()
            classify = fit(features[draw["support"]], draw["labels"])
            then = time.process_time()
            asked = draw["queries"] if name in TRANSDUCTIVE else np.concatenate([draw["queries"], draw["unknown"]])
            found[f"{number}-{name}"] = classify(features[asked])
            found[f"{number}-{name}-seconds"] = (time.process_time() if name in LATE else then) - began
        print(number, flush=True)
    np.savez(file.with_suffix(".answers.npz"), **found)


def peers(centre: np.ndarray) -> dict[str, Callable[[np.ndarray, np.ndarray], Classify]]:
    """Methods by name: features (S, D) and labels to a classifier. `centre` (D,) is the base classes' mean feature."""
    import torch
    from easyfsl.methods import BDCSPN, TIM, Finetune, PrototypicalNetworks, SimpleShot
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    def scikit(make: Callable[[int], Any]) -> Callable[[np.ndarray, np.ndarray], Classify]:
        return lambda features, labels: make(int((labels == 0).sum())).fit(features, labels).predict_proba

    return {
        "scikit-learn LogisticRegression": scikit(lambda _: LogisticRegression(max_iter=1000)),
        "scikit-learn KNeighborsClassifier": scikit(lambda shots: KNeighborsClassifier(min(5, shots))),
        "easyfsl PrototypicalNetworks": easyfsl(PrototypicalNetworks),
        "easyfsl SimpleShot": easyfsl(SimpleShot),
        "easyfsl SimpleShot, centred": easyfsl(SimpleShot, feature_centering=torch.from_numpy(centre)),
        "easyfsl Finetune": easyfsl(Finetune),
        "easyfsl BD-CSPN": easyfsl(BDCSPN),
        "easyfsl TIM": easyfsl(TIM),
        "Teachable Machine's head": two_layers,
    }


def easyfsl(method: Any, **options: Any) -> Callable[[np.ndarray, np.ndarray], Classify]:
    """A method of easyfsl on features, with its defaults."""
    import torch

    def fit(features: np.ndarray, labels: np.ndarray) -> Classify:
        model = method(use_softmax=True, **options)
        model.process_support_set(torch.from_numpy(features), torch.from_numpy(labels))

        def classify(
            queries: np.ndarray,
        ) -> np.ndarray:  # some methods learn here; this time is not counted
            return model(torch.from_numpy(queries)).detach().numpy()

        return classify

    return fit


def two_layers(features: np.ndarray, labels: np.ndarray) -> Classify:
    """Teachable Machine's head on its backbone's features: 100 units, 50 epochs of Adam, batches of 16."""
    import torch
    from torch.nn import functional as F

    x, y, ways = torch.from_numpy(features), torch.from_numpy(labels), int(labels.max()) + 1
    hidden, last = torch.nn.Linear(x.shape[1], 100), torch.nn.Linear(100, ways, bias=False)
    for layer in (hidden, last):  # its varianceScaling
        torch.nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    torch.nn.init.zeros_(hidden.bias)
    head = torch.nn.Sequential(hidden, torch.nn.ReLU(), last)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.001)
    for _ in range(50):
        for part in torch.randperm(len(x)).split(16):
            optimiser.zero_grad()
            F.cross_entropy(head(x[part]), y[part]).backward()
            optimiser.step()
    return lambda queries: head(torch.from_numpy(queries)).detach().softmax(1).numpy()


# ---- in kshot's


def environment(cache: Path) -> Path:
    """The Python interpreter of the peers' environment, which is created if missing."""
    folder = cache / "peers"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {' and '.join(PEERS)} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        (folder / "ready").touch()
    return python


Answers = dict[str, tuple[list[np.ndarray], list[float]]]
"""Of each method: the probabilities (queries, ways) and the seconds of each episode."""


def compared(name: str, data: Path, cache: Path, part: str, episodes: int) -> list[dict[str, Any]]:
    """Results on a data set: the peers on episodes of each size, or the fine-tuned backbone on those of one size."""
    from photo_heads import PROTOCOLS, SHOWN, Classes, built, percent, percents, play

    from kshot.evaluation.statistics import auroc
    from kshot_runtime.bundle import evidence

    protocol, classes, rows = SHOWN[name], Classes(name, data, cache), list[dict[str, Any]]()
    [word] = [word for word, one in PROTOCOLS.items() if one == protocol]
    chosen = [row for row in json.loads((cache / f"{name}-{word}.json").read_text())["rows"] if row["kshot_learn"]]
    for shape, mine in list(zip(classes.photos.shapes, chosen, strict=True))[PARTS[part]]:
        where = {"data": name, "protocol": protocol, "ways": shape.ways, "shots": shape.shots}
        draws, kind = classes.draws(shape, protocol, episodes), mine["features"]
        base = classes.features[kind][0].with_protocol(protocol)
        head = built(classes, mine["head"], kind, mine["settings"], base)
        found, seconds = play(head, classes.tables[kind], draws), list[float]()
        if part != "peers":
            given = {"efficientnet-lite0, fine-tuned": tune(classes, shape, draws)}
        else:
            given, seconds = turns(classes, shape, draws, head, classes.tables[kind], cache)
            sides = [evidence(found[side], mine["unknown_by"], mine["temperature"]) for side in ("known", "unknown")]
            accuracy, margin = percents(found["accuracies"])
            rows.append({
                **where, "method": f"kshot: {mine['head']} on {kind}", "episodes": len(draws), "accuracy": accuracy,
                "margin": margin, "auroc": percent(auroc(*sides)), "seconds": round(float(np.median(seconds)), 4),
            })  # fmt: skip
        for method, (probabilities, taken) in given.items():
            pairs = list(zip(probabilities, draws, strict=True))
            accuracies = np.array([(p[: len(d.truth)].argmax(1) == d.truth).mean() for p, d in pairs])
            accuracy, margin = percents(accuracies)
            ahead, ahead_margin = percents(found["accuracies"] - accuracies)
            rows.append({
                **where, "method": method, "episodes": len(draws), "accuracy": accuracy, "margin": margin,
                "auroc": None if method in TRANSDUCTIVE else percent(told(pairs)),
                "seconds": round(float(np.median(taken)), 4), "kshot_ahead": ahead, "kshot_ahead_margin": ahead_margin,
            })  # fmt: skip
            print(f"  {rows[-1]}", flush=True)
    return rows


def turns(
    classes: Any, shape: Any, draws: Sequence[Any], head: Any, table: Any, cache: Path
) -> tuple[Answers, list[float]]:
    """Results of the peers, and kshot's seconds to adapt to the same episodes, alternating."""
    import torch

    parts = ("support", "labels", "queries", "unknown")
    file = cache / f"{classes.name}-{shape.ways}-{shape.shots}.npz"
    held = {f"{i}-{part}": getattr(draw, part) for i, draw in enumerate(draws) for part in parts}
    centre = torch.cat([*classes.features["last"][0].by_class]).mean(0).numpy()
    np.savez(file, features=classes.tables["last"].numpy(), centre=centre, **held)
    asked, seconds = subprocess.Popen(
        [environment(cache), __file__, "--answer", file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ), list[float]()  # fmt: skip
    assert asked.stdin
    assert asked.stdout
    for i, draw in enumerate(draws):
        print(i, file=asked.stdin, flush=True)
        if not asked.stdout.readline():
            raise SystemExit("the peers failed; see above")
        support, labels = table[draw.support], torch.from_numpy(draw.labels)
        began = time.process_time()
        with torch.no_grad():
            head.fit(support, labels, torch.arange(shape.ways))
        seconds.append(time.process_time() - began)
    asked.stdin.close()
    asked.wait()
    answers = np.load(file.with_suffix(".answers.npz"))
    methods = dict.fromkeys(key.split("-", 1)[1] for key in answers.files if not key.endswith("-seconds"))
    every = range(len(draws))
    return {
        method: ([answers[f"{i}-{method}"] for i in every], [float(answers[f"{i}-{method}-seconds"]) for i in every])
        for method in methods
    }, seconds


def told(pairs: Sequence[tuple[np.ndarray, Any]]) -> float:
    """AUROC of known against unknown queries by the largest probability."""
    from kshot.evaluation.statistics import auroc

    known = np.concatenate([p[: len(d.truth)].max(1) for p, d in pairs])
    unknown = np.concatenate([p[len(d.truth) :].max(1) for p, d in pairs])
    return auroc(known, unknown)


def tune(classes: Any, shape: Any, draws: Sequence[Any]) -> tuple[list[np.ndarray], list[float]]:
    """Fine-tune the whole backbone with a linear layer on the support: 20 epochs of Adam at 1e-4, with flips."""
    import torch
    from photo_heads import recipe
    from torch.nn import functional as F

    from kshot import malloc
    from kshot.data.episodes import as_floats

    images = [classes.test.gather(np.full(count, i), np.arange(count)) for i, count in enumerate(classes.test.counts)]
    pixels, probabilities, taken = np.concatenate(images), [], []
    last = recipe("cosine", "last")
    fresh = last.model_copy(update={"backbone": last.backbone.model_copy(update={"frozen": False})})
    for number, draw in enumerate(draws):
        torch.manual_seed(number)
        began = time.process_time()
        body = fresh.build_backbone(classes.test.shape)
        model = torch.nn.Sequential(body, torch.nn.Linear(body.features, shape.ways))
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        x, y = as_floats(pixels[draw.support]), torch.from_numpy(draw.labels)
        with malloc.kept():
            for _ in range(20):
                for part in torch.randperm(len(x)).split(16):
                    flipped = torch.where(torch.rand(len(part), 1, 1, 1) < 0.5, x[part].flip(3), x[part])
                    optimiser.zero_grad()
                    F.cross_entropy(model(flipped), y[part]).backward()
                    optimiser.step()
            taken.append(time.process_time() - began)
            with torch.no_grad():
                asked = np.concatenate([draw.queries, draw.unknown[:25]])
                probabilities.append(torch.cat([model(as_floats(pixels[part])).softmax(1) for part in
                                                np.array_split(asked, -(-len(asked) // 16))]).numpy())  # fmt: skip
    return probabilities, taken


def report(cache: Path, data: Sequence[str]) -> None:
    from photo_heads import machine, put

    files = [cache / f"{name}-{part}.json" for name in data for part in PARTS]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())]
    versions = subprocess.run(
        [environment(cache), "-c", VERSIONS, *PEERS, "torch"], check=True, capture_output=True, text=True
    ).stdout.split()
    found = {
        "what": "the same episodes by kshot's choice and by what one would take instead",
        "machine": machine(),
        "versions": dict(zip((*PEERS, "torch"), versions, strict=True)),
        "behind": [row for row in rows if "kshot_ahead" in row and row["kshot_ahead"] <= row["kshot_ahead_margin"]],
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    put("peers", "\n\n".join(peer_table([row for row in rows if row["data"] == name]) for name in data))


VERSIONS = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"


def peer_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table row per method, with its results at each episode size."""
    from photo_heads import shown, table

    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    first = rows[0]
    sizes = [f"{row['ways']}-way {row['shots']}-shot" for row in methods[first["method"]]]
    lines = []
    for method, own in methods.items():
        few = f", {own[0]['episodes']} episodes" if own[0]["episodes"] < first["episodes"] else ""
        line = [method + (" (transductive)" if method in TRANSDUCTIVE else "") + few]
        for row in own:
            ahead = f"{row['kshot_ahead']:+.1f} ± {row['kshot_ahead_margin']:.1f}" if "kshot_ahead" in row else ""
            told = "" if row["auroc"] is None else f"{row['auroc']:.1f}"
            ms = 1000 * row["seconds"]
            line += [shown(row), ahead, told, f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}"]
        lines.append(line + ["not measured", "", "", ""] * (len(sizes) - len(own)))
    columns = ["method", *(cell for size in sizes for cell in (size, "kshot ahead", "AUROC", "ms to adapt"))]
    return f"**{first['data']}, {first['protocol']}**\n\n{table(columns, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("sets", nargs="*", default=["fruit", "coins", "emoji-4v"])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "kshot-photos")
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--tuned", type=int, default=8, help="episodes of the fine-tuned backbone")
    parser.add_argument("--only", choices=[*PARTS], help="a part of what is measured")
    parser.add_argument("--report", action="store_true", help="join what was measured before; measure nothing")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        return report(options.cache, options.sets)
    if options.answer:
        return answer(options.answer)
    import torch

    torch.set_num_threads(1)
    for name in options.sets:
        for part in PARTS:
            if options.only in (None, part):
                episodes = options.episodes if part == "peers" else options.tuned
                rows = compared(name, options.data, options.cache, part, episodes)
                (options.cache / f"{name}-{part}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
