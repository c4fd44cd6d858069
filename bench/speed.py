"""Compare the speed of kshot with easyfsl, learn2learn, higher and torchopt, and of its bundles with torch.

    python bench/speed.py [--data data/omniglot] [--learn2learn SOURCE] [--quick] [--only WORDS]

Installs the peers into a separate environment the first time (bench/peers/environment.py; offline, give a
copy of learn2learn's git repository). All contenders have the same network, weights and images; their losses are
compared before anything is timed. They alternate within each round, in CPU time; a ratio is of one round, of which the
median counts, and `low` and `high` bound the middle half. "As they come" runs each contender in a separate process,
in which the peers use malloc's defaults.

Writes bench/results/speed.json, docs/performance.md and docs/performance.png; with --quick or --only it only prints.
Without Omniglot, the built-in glyphs are used.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import performance_page
from onnx_vs_torch import machine

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import FOLDER, LEARN2LEARN, prepare

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.json"
KSHOT = (sys.executable, "-c", "from kshot_flows.cli.main import main; main()")
EQUAL = 1e-4  # relative tolerance of kshot's losses with and without an optimisation, in float32
SAME = 1e-8  # relative tolerance of kshot's and the peers' losses, in float64


class Bench(NamedTuple):
    """Settings of this run."""

    python: Path
    data: str
    quick: bool

    def turn(self, measure: str, **asked: Any) -> dict[str, Any]:
        """Run one measurement in a process of the peers' environment."""
        command = [self.python, HERE / "peers" / "contenders.py", json.dumps({"measure": measure, **asked})]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def rounds(self, wanted: int) -> int:
        return 2 if self.quick else wanted


Found = dict[str, Any]


class Row(NamedTuple):
    """A result: the ratio of `against` to kshot, or of kshot to it if lower is better."""

    what: str
    against: str
    bar: float
    measure: Callable[[Bench], Found]
    better: str = "higher"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/omniglot"), help="a packed data set of 28 x 28 x 1")
    parser.add_argument("--peers", type=Path, default=FOLDER, help="where their environment is, or will be")
    parser.add_argument("--learn2learn", default=LEARN2LEARN, metavar="SOURCE", help="a git repository with its source")
    parser.add_argument("--quick", action="store_true", help="two rounds of everything")
    parser.add_argument("--only", metavar="WORDS", default="", help="rows whose names contain this")
    options = parser.parse_args()
    bench = Bench(prepare(options.peers, options.learn2learn), images(options.data, options.peers), options.quick)
    rows, causes = ([measured(row, bench) for row in part if options.only in row.what] for part in (ROWS, CAUSES))
    if options.quick or options.only:
        return
    write(rows, causes, bench)
    performance_page.main()


def measured(row: Row, bench: Bench) -> Found:
    about = {"what": row.what, "against": row.against, "bar": row.bar, "better": row.better}
    found = about | row.measure(bench)
    print(performance_page.sentence(found), flush=True)
    return found


def write(rows: Sequence[Found], causes: Sequence[Found], bench: Bench) -> None:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    found = {
        "what": f"one thread, CPU time, conv4-64; 28 x 28 images: {Path(bench.data).name}",
        "machine": f"{machine()}, {os.cpu_count()} threads",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": json.loads(subprocess.run([bench.python, "-c", VERSIONS], capture_output=True, check=True).stdout),
        "rows": rows,
        "causes": causes,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({n: m.version(n) for n in ('torch', 'onnxruntime-gpu', 'easyfsl', 'higher', 'torchopt')}))"
)


def images(data: Path, folder: Path) -> str:
    """The data set to measure on: the given one, or glyphs, drawn once."""
    if data.exists():
        return str(data.resolve())
    drawn = folder / "data" / "glyphs"
    if not drawn.exists():
        subprocess.run(
            [*KSHOT, "data", "import", "glyphs", "glyphs"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    return str(drawn)


# --- what is measured


def protonet(bench: Bench, shape: tuple[int, int, int], *, apart: bool, noise: bool = False) -> Found:
    """A ProtoNet step, with tuned malloc for all contenders, or each with its defaults."""
    case = {"method": "protonet", "data": "noise" if noise else bench.data, "shape": shape}
    one_pass = bench.turn("losses", **case)
    two_passes = bench.turn("losses", **case, norm="batch")
    equal({name: one_pass[name] for name in ("kshot", "learn2learn")})
    equal({"kshot": two_passes["kshot"], "easyfsl": one_pass["easyfsl"]})  # support and query by themselves
    if not apart:
        return ratios(bench.turn("steps", **case, rounds=bench.rounds(3 if noise else 9))["times"])
    times: dict[str, list[float]] = {name: [] for name in one_pass}
    for _ in range(bench.rounds(3)):
        for name in times:
            alone = bench.turn("steps", **case, rounds=3, only=name, kept=name == "kshot")  # as `meta_train` does
            times[name].append(median(alone["times"][name]))
    return ratios(times)


def maml(bench: Bench, *, first_order: bool) -> Found:
    """A step of 4 episodes, 5-way 1-shot with 15 queries, 5 inner steps."""
    case = {"method": "maml", "data": bench.data, "shape": (5, 1, 15), "episodes": 4, "inner": 5}
    equal(bench.turn("losses", **case, first_order=first_order))
    return ratios(bench.turn("steps", **case, first_order=first_order, rounds=bench.rounds(7))["times"])


def maml_memory(bench: Bench) -> Found:
    """Peak memory of MAML with 16 episodes, second order; each contender in a separate process."""
    case = {"method": "maml", "data": bench.data, "shape": (5, 1, 15), "episodes": 16, "inner": 5, "first_order": False}
    peaks: dict[str, list[float]] = {name: [] for name in ("kshot", "learn2learn", "higher", "torchopt")}
    equal(bench.turn("losses", **case))
    for _ in range(bench.rounds(3)):
        for name in peaks:
            peaks[name].append(bench.turn("memory", **case, only=name)["mb"])
    return ratios(peaks, unit="MB", inverse=True)


def maml_evaluation(bench: Bench) -> Found:
    episodes = 8 if bench.quick else 24
    found = bench.turn(
        "evaluation", method="maml", data=bench.data, rounds=bench.rounds(5), episodes=episodes, peer_episodes=episodes,
        inner=10,
    )  # fmt: skip
    accuracies = found["accuracies"]
    if abs(accuracies["kshot"] - accuracies["learn2learn"]) > 0.5:  # rounding occasionally changes a prediction
        raise SystemExit(f"the same episodes, and other accuracies: {accuracies}")
    return ratios(found["times"], unit="s") | {"accuracies": accuracies, "episodes": episodes}


def protonet_evaluation(bench: Bench) -> Found:
    """Time of 10,000 test episodes; easyfsl's is that of 300 times 33.3, as it embeds each episode's images again."""
    episodes, some = 10_000, 60 if bench.quick else 300
    found = bench.turn(
        "evaluation", method="protonet", data=bench.data, rounds=bench.rounds(3), episodes=episodes, peer_episodes=some
    )
    found["times"]["easyfsl"] = [episodes / some * took for took in found["times"]["easyfsl"]]
    note = f"easyfsl: {some} episodes, times {episodes / some:.1f}"
    return ratios(found["times"], unit="s") | {"accuracies": found["accuracies"], "note": note}


class Bundles:
    """The results of bench/onnx_vs_torch.py, run once."""

    @cached_property
    def rows(self) -> list[Found]:
        subprocess.run([sys.executable, HERE / "onnx_vs_torch.py"], check=True, stdout=subprocess.DEVNULL)
        rows: list[Found] = json.loads((HERE / "results" / "onnx_vs_torch.json").read_text())["rows"]
        return rows

    def maml(self, bench: Bench, what: str) -> Found:
        row = next(row for row in self.rows if (row["learner"], row["what"]) == ("maml", what))
        low, high = row["ratio_middle_half"]
        return {
            "ratio": row["ratio"], "low": low, "high": high, "unit": "ms", "ours": row["onnxruntime_ms"],
            "theirs": {"torch": row["torch_ms"]},
            "note": f"with freed memory kept for torch too: {row['ratio_to_torch_with_memory_kept']:.3g}",
        }  # fmt: skip


def ablation(bench: Bench, cause: str, **case: Any) -> Found:
    """kshot's step with and without one of its optimisations."""
    found = bench.turn("ablation", cause=cause, data=bench.data, rounds=bench.rounds(7), **case)
    equal(found["losses"], EQUAL)
    return ratios(found["times"])


def kept_memory(bench: Bench) -> Found:
    """A step with freed memory kept, and one with malloc's defaults, each in a separate process."""
    case = {"method": "protonet", "data": bench.data, "shape": (60, 1, 5), "rounds": 3, "only": "kshot"}
    times: dict[str, list[float]] = {"kshot": [], "without": []}
    for _ in range(bench.rounds(5)):
        for name in times:
            times[name].append(median(bench.turn("steps", **case, kept=name == "kshot")["times"]["kshot"]))
    return ratios(times)


def cached_features(bench: Bench) -> Found:
    episodes, some = 10_000, 60 if bench.quick else 300
    times = bench.turn("uncached", data=bench.data, rounds=bench.rounds(3), episodes=episodes, some=some)["times"]
    return ratios(times, unit="s") | {"note": f"{some} episodes, times {episodes / some:.1f}"}


def second_run(bench: Bench) -> Found:
    """CPU seconds of an unchanged `make run`."""
    command = [*KSHOT, "run", "glyphs-protonet"]
    command += ["training.steps=20", "training.validate_every=20"] if bench.quick else []
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + bench.rounds(5)):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return spread(took[1:]) | {"unit": "s", "ours": round(median(took[1:]), 2), "theirs": {}}


def equal(losses: Mapping[str, float], tolerance: float = SAME) -> None:
    """Raise an error unless contenders compute the same loss."""
    values = list(losses.values())
    if max(values) - min(values) > tolerance * max(values):
        raise SystemExit(f"the first losses differ, so that these steps are not the same: {losses}")


def ratios(taken: Mapping[str, Sequence[float]], *, unit: str = "ms", inverse: bool = False) -> Found:
    """Ratios of the best other to kshot, per round."""
    peers = {name: round(median(values), 2) for name, values in taken.items() if name != "kshot"}
    best = min(peers, key=lambda name: peers[name])
    pairs = list(zip(taken[best], taken["kshot"], strict=True))
    found = spread([ours / theirs if inverse else theirs / ours for theirs, ours in pairs])
    return found | {"unit": unit, "ours": round(median(taken["kshot"]), 2), "theirs": peers}


def spread(values: Sequence[float]) -> Found:
    """The median, and the middle half."""
    ordered = sorted(values)
    quarter = (len(ordered) - 1) / 4
    low, high = ordered[int(quarter)], ordered[-1 - int(quarter)]
    return {"ratio": round(median(ordered), 3), "low": round(low, 3), "high": round(high, 3), "rounds": len(ordered)}


BUNDLES = Bundles()
METRIC, GRADIENT = "best of easyfsl, learn2learn", "best of learn2learn, higher, torchopt"
TORCH = "torch, the same block"
ROWS = (
    Row("ProtoNet step, 60-way 1-shot", METRIC, 1.35, partial(protonet, shape=(60, 1, 5), apart=False)),
    Row("ProtoNet step, 5-way 5-shot", METRIC, 1.35, partial(protonet, shape=(5, 5, 15), apart=False)),
    Row("ProtoNet step, 84x84x3, 10-way 5-shot", METRIC, 1.4,
        partial(protonet, shape=(10, 5, 5), apart=False, noise=True)),
    Row("ProtoNet step, 60-way 1-shot, as they come", METRIC, 2.4, partial(protonet, shape=(60, 1, 5), apart=True)),
    Row("ProtoNet step, 5-way 5-shot, as they come", METRIC, 1.8, partial(protonet, shape=(5, 5, 15), apart=True)),
    Row("ProtoNet step, 84x84x3, 10-way 5-shot, as they come", METRIC, 2.6,
        partial(protonet, shape=(10, 5, 5), apart=True, noise=True)),
    Row("MAML step, second order", GRADIENT, 1.25, partial(maml, first_order=False)),
    Row("MAML step, first order", "best of learn2learn, higher", 1.25, partial(maml, first_order=True)),
    Row("MAML peak memory, 16 episodes", GRADIENT, 1.2, maml_memory, better="lower"),
    Row("MAML evaluation, 10 steps", "learn2learn, first order", 1.3, maml_evaluation),
    Row("10,000 ProtoNet test episodes", "easyfsl", 35, protonet_evaluation),
    Row("Bundle: MAML adapts to 25 photos, 5 steps", TORCH, 1.0, partial(BUNDLES.maml, what="adapt to 25")),
    Row("Bundle: MAML classifies 75 photos", TORCH, 1.5, partial(BUNDLES.maml, what="classify 75")),
    Row("Bundle: MAML classifies 1 photo", TORCH, 2, partial(BUNDLES.maml, what="classify 1")),
    Row("`make run`, the second time", "", 2.5, second_run, better="lower"),
)  # fmt: skip

PROTONET = {"method": "protonet", "shape": (60, 1, 5)}
SECOND = {"method": "maml", "shape": (5, 1, 15), "episodes": 4, "inner": 5, "first_order": False}
CAUSES = (
    Row("Channels last: ProtoNet step, 60-way 1-shot", "images in torch's usual layout", 1,
        partial(ablation, cause="layout", **PROTONET)),
    Row("Pooling before scale and shift: ProtoNet step, 60-way 1-shot", "the usual order", 1,
        partial(ablation, cause="order", **PROTONET)),
    Row("Pooling before scale and shift: MAML step, second order", "the usual order", 1,
        partial(ablation, cause="order", **SECOND)),
    Row("First inner step in closed form: MAML step, second order", "by a backward pass", 1,
        partial(ablation, cause="first step", **SECOND)),
    Row("Freed memory kept: ProtoNet step, 60-way 1-shot", "malloc as it comes", 1, kept_memory),
    Row("Features cached: 10,000 ProtoNet test episodes", "each episode's images embedded", 1, cached_features),
)  # fmt: skip


if __name__ == "__main__":
    main()
