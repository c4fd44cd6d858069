"""Open-loop Poisson load on the server: minutes at 70 % of its capacity, and then minutes at ten times its capacity.

    python bench/serve_overload.py [--minutes 5] [--overload 5] [--photo-side 3000]

Requests arrive at random times, independent of earlier answers, and latency counts from the scheduled time.
Each is one large JPEG photo to classify (ProtoNet, conv4-64, 28 x 28), so that the server's capacity is low enough for
ten times of it to be generated on the same processor; the generator's CPU time is reported. Capacity is the rate that
closed-loop clients reach. Writes bench/results/serve_overload.json.
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serving_load import (
    Sent,
    Served,
    arguments,
    arrivals,
    bar,
    build,
    fill,
    meanwhile,
    milliseconds,
    photo,
    request,
    saturate,
    serving,
    write,
)

from kshot_serve.settings import EngineSettings

WAYS, SHARE, TIMES = 5, 0.7, 10
TAIL = 5.0  # p99 at most this many medians; beyond capacity the wait that is admitted comes on top
REFUSAL_MS = 50
SETTLED_S = 5.0  # start of a load that is excluded: an accepted burst has been answered by then
GROWTH_MB = 64  # growth beyond which memory does not count as flat


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--overload", type=float, default=5.0, help="minutes")
    parser.add_argument("--photo-side", type=int, default=3000, help="pixels")
    parser.add_argument("--clients", type=int, default=8, help="of the measurement of capacity")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = build("protonet", Path(scratch) / "bundle")
        with serving(bundle, Path(scratch) / "server") as server:
            with server.client() as client:
                space = fill(client, WAYS, photo)
            photos = [large(number, options.photo_side) for number in range(8)]
            requests = [request(f"/v1/spaces/{space}/classify", each, "image/jpeg") for each in photos]
            asyncio.run(saturate(server.port, requests, options.clients, 5.0))  # warm-up, until memory has grown
            capacity = rate(asyncio.run(saturate(server.port, requests, options.clients, 15.0)), 15.0)
            print(f"capacity: {capacity:.1f} requests a second, photos of {np.mean([*map(len, photos)]) / 1000:.0f} kB")
            steady = load(server, requests, SHARE * capacity, 60 * options.minutes)
            over = load(server, requests, TIMES * capacity, 60 * options.overload)
            after = load(server, requests, SHARE * capacity, 10.0)
    found = {
        "what": f"open-loop Poisson load: photos of {options.photo_side} x {options.photo_side} pixels, conv4-64",
        "photo_bytes": round(float(np.mean([*map(len, photos)]))),
        "capacity_per_second": round(capacity, 1),
        "steady": steady,
        "overload": over,
        "after": after,
    }
    most = 1000 * EngineSettings().wait_s + TAIL * steady["accepted_ms"]["p50"]
    tail, settled = over["accepted_ms"]["p99"], over["settled_ms"]["p99"]
    failed, refusals = steady["failed"], steady["refused"]
    ratio = round(steady["accepted_ms"]["p99"] / steady["accepted_ms"]["p50"], 2)
    growth = round(over["memory_mb"]["end"] - over["memory_mb"]["begin"], 1)
    refused = over["refused_ms"].get("p99", float("nan"))
    found["bars"] = [
        bar(f"{SHARE:.0%} of capacity, {options.minutes:g} minutes: failures", failed, 0, not failed),
        bar("there, refusals", refusals, 0, not refusals),
        bar("there, p99 in medians", ratio, TAIL, ratio < TAIL),
        bar(f"{TIMES} times capacity: failures other than refusals", over["failed"], 0, not over["failed"]),
        bar("there, p99 of accepted requests", tail, most, tail < most, "ms"),
        bar(f"there, of those that came after {SETTLED_S:g} s", settled, most, settled < most, "ms"),
        bar("there, p99 of refusals", refused, REFUSAL_MS, refused < REFUSAL_MS, "ms"),
        bar("there, memory grew by", growth, GROWTH_MB, growth < GROWTH_MB, "MB"),
    ]  # fmt: skip
    write("serve_overload", found, "uvloop", "httptools", "pillow")


def large(number: int, side: int) -> bytes:
    """A large, smooth photo: few bytes, long decoding."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
    file = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75, progressive=True)
    return file.getvalue()


def rate(sent: Sequence[Sent], seconds: float) -> float:
    """Answers per second; any other reply is an error of the benchmark."""
    assert all(each.reply.status == 200 for each in sent), Counter(each.reply.status for each in sent)
    return len(sent) / max(seconds, max(each.due + each.took for each in sent))


def load(server: Served, requests: Sequence[bytes], per_second: float, seconds: float) -> dict[str, Any]:
    """Run an open-loop load, and summarise its requests."""
    own, theirs, began = time.process_time(), server.processor(), time.perf_counter()
    with watched(server) as memory:
        sent = asyncio.run(arrivals(server.port, requests, per_second, seconds))
    took = time.perf_counter() - began
    accepted = [each for each in sent if each.reply.status == 200]
    refused = [each for each in sent if each.reply.status in (429, 503)]
    others = Counter(each.reply.status for each in sent if each.reply.status not in (200, 429, 503))
    figures = {
        "asked_per_second": round(len(sent) / seconds, 1),
        "answered_per_second": round(len(accepted) / took, 1),
        "accepted": len(accepted),
        "refused": len(refused),
        "refusals": dict(Counter(reason(each) for each in refused)),
        "failed": sum(others.values()),
        "failures": {str(status): count for status, count in others.items()},
        "accepted_ms": milliseconds([each.took for each in accepted]),
        "settled_ms": milliseconds([each.took for each in accepted if each.due > SETTLED_S]),
        "refused_ms": milliseconds([each.took for each in refused]),
        "memory_mb": {"begin": round(memory[0], 1), "most": round(max(memory), 1), "end": round(memory[-1], 1)},
        "generators_share_of_one_core": round((time.process_time() - own) / took, 3),
        "servers_share_of_one_core": round((server.processor() - theirs) / took, 3),
    }
    print(json.dumps(figures), flush=True)
    return figures


def reason(each: Sent) -> str:
    error = json.loads(each.reply.body)["error"]
    return f"{each.reply.status} {error['code']} {error.get('reason', '')}".strip()


@contextmanager
def watched(server: Served) -> Iterator[list[float]]:
    """Record the server's memory in MB, twice per second."""
    memory = [server.memory()]
    with meanwhile(lambda: memory.append(server.memory()), pause=0.5):
        yield memory
    memory.append(server.memory())


if __name__ == "__main__":
    main()
