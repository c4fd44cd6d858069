"""Check that nothing is lost: requests during champion swaps and shutdown, writes when the server is killed.

    python bench/serve_changes.py [--workers 1] [--swaps 20] [--kills 20] [--only swaps sigterm kills corrupt]

Swaps: `kshot serve models:/NAME@production` follows a real MLflow registry on SQLite, in which the alias is moved,
while classify requests arrive at random times. SIGTERM: under the same load; requests that the server logged as
answered must have reached the clients. kill -9: at random moments while four writers add and delete classes; then a new
server on the same folder is asked for everything that was acknowledged. Corrupt: 32 requests at once, one of them with
a photo that is cut short. Writes bench/results/serve_changes.json; with several workers, another beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from serving_load import (
    Connections,
    Sent,
    arguments,
    arrivals,
    bar,
    build,
    fill,
    form,
    meanwhile,
    milliseconds,
    photo,
    request,
    serving,
    write,
)

from kshot_client import RefusedError
from kshot_flows import registry
from kshot_flows.tracking import runs

WHAT = "swaps, SIGTERM, kill -9 and a corrupt photo, conv4, 28x28x1"
WAYS, SHOTS, WRITERS, AT_ONCE, MODEL = 5, 5, 4, 32, "bench"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second, of swaps and SIGTERM")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    found: dict[str, Any] = {"what": f"{WHAT}, {options.workers} worker{'s' * (options.workers > 1)}", "bars": []}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = build("protonet", Path(scratch) / "bundle")
        for name in options.only:
            found[name], bars = PARTS[name](bundle, Path(scratch) / name, options)
            print(json.dumps(found[name]))
            found["bars"] += bars
    write(
        "serve_changes" if options.workers == 1 else f"serve_changes_{options.workers}_workers",
        found,
        "mlflow",
        "sqlalchemy",
    )


def many(options: argparse.Namespace) -> tuple[str, str]:
    return "--workers", str(options.workers)


def questions(space: str) -> list[bytes]:
    path = f"/v1/spaces/{space}/classify"
    return [request(path, photo(i % WAYS, i), "image/png") for i in range(64)]


@contextmanager
def under_load(port: int, requests: Sequence[bytes], rate: float) -> Iterator[list[Sent]]:
    """Send requests at random times while the block runs; afterwards the list has all of them."""
    sent: list[Sent] = []
    seeds = count(1)
    with meanwhile(lambda: sent.extend(asyncio.run(arrivals(port, requests, rate, 2.0, next(seeds))))):
        yield sent


def swaps(bundle: Path, folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Swap champions under load; the results of the requests meanwhile."""
    folder.mkdir()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["KSHOT_HOME"] = str(folder)
    with runs.run(MODEL, recipe={}, data=runs.DataRef("noise", "f" * 64), seed=1) as run:
        made = [registry.register(MODEL, run.id, each) for each in (bundle, build("protonet", folder / "b", width=48))]
    registry.move(MODEL, made[0], "production", why="bench")
    waits, seen = [], {str(made[0])}
    with serving(f"models:/{MODEL}@production", folder / "server", *many(options)) as server, server.client() as client:
        space = fill(client, WAYS, photo)
        with under_load(server.port, questions(space), options.rate) as sent:
            for turn in range(1, options.swaps + 1):
                version = made[turn % 2]
                began = time.perf_counter()
                registry.move(MODEL, version, "production", why="bench")
                while client.call("GET", "/v1/model").json()["version"] != str(version):
                    if time.perf_counter() > began + 60:
                        raise SystemExit(
                            f"version {version} does not serve after a minute:\n{server.log.read_text()[-2000:]}"
                        )
                    time.sleep(0.1)
                waits.append(time.perf_counter() - began)
    statuses = Counter(each.reply.status for each in sent)
    for each in sent:
        if each.reply.status == 200:
            seen.add(json.loads(each.reply.body)["model"]["version"])
    failed = len(sent) - statuses[200]
    took = milliseconds([each.took for each in sent])
    figures = {
        "requests": len(sent), "statuses": by_name(statuses), "versions_that_answered": sorted(seen),
        "answers_ms": took,
        "seconds_from_the_alias_to_the_swap": {"median": round(median(waits), 1), "max": round(max(waits), 1)},
    }  # fmt: skip
    return figures, [
        bar("swaps under load", len(waits), options.swaps, len(waits) == options.swaps),
        bar("there, failed requests", failed, 0, failed == 0 and len(seen) == 2),
    ]


def sigterm(bundle: Path, folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Terminate a server under load."""
    with serving(bundle, folder, *many(options)) as server:
        with server.client() as client:
            space = fill(client, WAYS, photo)
        with under_load(server.port, questions(space), options.rate) as sent:
            time.sleep(3.0)
            began = time.perf_counter()
            code = server.stop(signal.SIGTERM)
            ended = time.perf_counter() - began
    answered = Counter(each.reply.status for each in sent)
    logged = log_statuses(server.log)
    never, lost = answered.pop(-1, 0), answered.pop(0, 0)
    unanswered = (logged - answered).total()
    figures = {
        "requests": len(sent), "statuses": by_name(answered), "found_the_server_gone": never, "connections_lost": lost,
        "seconds_to_the_end": round(ended, 2), "exit_code": code,
    }  # fmt: skip
    return figures, [
        bar("SIGTERM: accepted requests without an answer", unanswered, 0, unanswered == 0 and lost == 0),
        bar("there, exit code", code, 0, code == 0),
    ]


def log_statuses(log: Path) -> Counter[int]:
    """Numbers of classify requests in the server's log, by status."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return Counter(line["status"] for line in lines if line.get("route", "").endswith("/classify"))


@dataclass
class Written:
    """The acknowledged writes of one writer."""

    space: str
    photos: dict[str, list[bytes]] = field(default_factory=dict)  # of each class by its name
    ids: dict[str, tuple[str, list[str]]] = field(default_factory=dict)  # the class's, its photos'
    deleted: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)  # deletion requested, not acknowledged
    revision: int = 1


def kills(bundle: Path, folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Kill servers while label spaces are written, and check the state of the next server."""
    dice = random.Random(0)
    written: list[Written] = []
    acknowledged = lost = half = unacknowledged = 0
    starts = []
    for turn in range(options.kills + 1):
        began = time.perf_counter()
        with serving(bundle, folder, *many(options)) as server, server.client() as client:
            starts.append(time.perf_counter() - began)
            if not written:
                made = (client.call("POST", "/v1/spaces", json={"name": f"{n}"}).json() for n in range(WRITERS))
                written = [Written(each["id"]) for each in made]
            for each in written:
                gone, torn, extra = compared(client, each)
                lost, half, unacknowledged = lost + gone, half + torn, unacknowledged + extra
            if turn == options.kills:
                break
            asyncio.run(killed(server.port, server.kill, written, turn, dice.uniform(0.2, 2.0)))
            server.process.wait()
    acknowledged = sum(each.revision - 1 for each in written)
    figures = {
        "kills": options.kills, "acknowledged_writes": acknowledged,
        "classes": sum(len(each.photos) for each in written), "deleted": sum(len(each.deleted) for each in written),
        "there_though_never_acknowledged": unacknowledged, "start_s": round(median(starts), 2),
    }  # fmt: skip
    return figures, [
        bar(f"kill -9, {options.kills} times: acknowledged writes lost", lost, 0, lost == 0 and acknowledged > 0),
        bar("there, classes half written", half, 0, half == 0),
    ]


async def killed(port: int, kill: Any, written: Sequence[Written], turn: int, after: float) -> None:
    """Run writers until the server is killed at a random moment."""
    asyncio.get_running_loop().call_later(after, kill)
    await asyncio.gather(*[writer(port, each, turn * 10_000 + 1000 * n) for n, each in enumerate(written)])


async def writer(port: int, done: Written, number: int) -> None:
    """Add classes, and delete every second one, until the server no longer answers."""
    connections = Connections(port)
    while True:
        number += 1
        photos, name = [photo(number, shot) for shot in range(SHOTS)], f"class {number}"
        body, kind = form(photos)
        named = b'--edge\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + name.encode() + b"\r\n"
        reply = await connections.ask(request(f"/v1/spaces/{done.space}/classes", named + body, kind))
        if reply.status != 201:
            break
        answer = json.loads(reply.body)
        done.photos[name] = photos
        done.ids[name] = answer["class"]["id"], answer["photos"]
        done.revision = answer["revision"]
        if number % 2 == 0:
            done.doubtful.add(name)
            path = f"/v1/spaces/{done.space}/classes/{done.ids[name][0]}"
            reply = await connections.ask(f"DELETE {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            if reply.status != 200:
                break
            done.doubtful.discard(name)
            done.deleted.add(name)
            done.revision = json.loads(reply.body)["revision"]
    if reply.status > 0:
        raise SystemExit(f"a write was answered {reply.status}: {reply.body!r}")
    connections.close()


def compared(client: Any, done: Written) -> tuple[int, int, int]:
    """Compare a server's state with acknowledged writes: lost ones, incomplete classes, unexpected ones."""
    there = client.call("GET", f"/v1/spaces/{done.space}/classes").json()
    known = {each["name"]: each for each in there["classes"]}
    lost = int(there["revision"] < done.revision)
    for name, photos in done.photos.items():
        class_, ids = done.ids[name]
        if name in done.deleted or (name in done.doubtful and name not in known):
            lost += name in known
            try:
                client.call("GET", f"/v1/spaces/{done.space}/photos/{ids[0]}")
                lost += 1
            except RefusedError as refused:
                lost += refused.code != "photo_unknown"
            continue
        if name not in known or known[name]["id"] != class_ or [each["id"] for each in known[name]["photos"]] != ids:
            lost += 1
            continue
        for id_, content in zip(ids[:1], photos, strict=False):
            lost += client.call("GET", f"/v1/spaces/{done.space}/photos/{id_}").content != content
    half = sum(len(each["photos"]) != SHOTS for each in known.values())
    extra = set(known) - set(done.photos)
    if known:
        client.call(
            "POST", f"/v1/spaces/{done.space}/classify", content=photo(0), headers={"Content-Type": "image/png"}
        )
    return lost, half, len(extra)


def by_name(statuses: Counter[int]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(statuses.items())}


def corrupt(bundle: Path, folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Send one truncated photo among concurrent valid ones."""
    rounds, right = 20, 0
    dice = random.Random(0)
    with serving(bundle, folder, *many(options)) as server:
        with server.client() as client:
            space = fill(client, WAYS, photo)
        path, bad = f"/v1/spaces/{space}/classify", photo(0, 99)[:-40]

        async def together(which: int) -> list[int]:
            connections = Connections(server.port)
            asked = [photo(n % WAYS, n) if n != which else bad for n in range(AT_ONCE)]
            replies = await asyncio.gather(*[connections.ask(request(path, each, "image/png")) for each in asked])
            connections.close()
            return [reply.status for reply in replies]

        statuses: Counter[int] = Counter()
        for _ in range(rounds):
            which = dice.randrange(AT_ONCE)
            came = asyncio.run(together(which))
            statuses.update(came)
            right += came == [422 if n == which else 200 for n in range(AT_ONCE)]
    figures = {"rounds": rounds, "at_once": AT_ONCE, "statuses": by_name(statuses)}
    return figures, [bar("one corrupt among 32: rounds with 31 answers and one 422", right, rounds, right == rounds)]


PARTS = {"swaps": swaps, "sigterm": sigterm, "kills": kills, "corrupt": corrupt}


if __name__ == "__main__":
    main()
