"""Time to add a class of 5 photos to a label space of 100 classes over HTTP, and until an answer includes it.

    python bench/serve_add_class.py [--adds 100] [--protonet BUNDLE] [--maml BUNDLE]

Without bundles, untrained ones of the size of Omniglot's recipes are built: conv4-64, 28 x 28, MAML with 2 steps. Each
add is followed by classifying one of its photos, and by deleting the class, which is not timed. The server is a
separate `kshot serve`. Writes bench/results/serve_add_class.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from serving_load import add, arguments, bar, build, fill, milliseconds, photo, serving, write

CLASSES, SHOTS = 100, 5
BARS_MS = {"protonet": 300, "maml": 1500}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--adds", type=int, default=100)
    for name in BARS_MS:
        parser.add_argument(f"--{name}", type=Path, metavar="BUNDLE")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "what": f"a class of {SHOTS} photos added to {CLASSES} classes of {SHOTS}, conv4-64, 28x28x1, over HTTP",
        "adds": options.adds,
        "learners": {},
        "bars": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, most in BARS_MS.items():
            bundle = getattr(options, name)
            found["learners"][name] = row = measure(
                bundle or build(name, Path(scratch) / name), Path(scratch) / f"{name}-server", options.adds
            )
            row["bundle"] = "given" if bundle else "untrained"
            print(f"{name:9}", *(f"{what} {row[what]}" for what in ("add_ms", "classify_ms", "both_ms")), flush=True)
            found["bars"] += [
                bar(f"{name}: adding, p95", row["add_ms"]["p95"], most, row["add_ms"]["p95"] < most, "ms"),
                bar(f"{name}: until the answer that knows it, p95", row["both_ms"]["p95"], most,
                    row["both_ms"]["p95"] < most, "ms"),
                bar(f"{name}: known to the next answer", row["known"], options.adds, row["known"] == options.adds),
            ]  # fmt: skip
    write("serve_add_class", found, "sqlalchemy", "pillow")


def measure(bundle: Path, folder: Path, adds: int) -> dict[str, Any]:
    """Seconds of each add and of the following request, and how often its answer was the new class."""
    added, asked = [], []
    known = named = 0
    with serving(bundle, folder) as server, server.client() as client:
        space = fill(client, CLASSES, photo, SHOTS)
        for turn in range(adds + 3):
            client.call("POST", f"/v1/spaces/{space}/classify", content=photo(0), headers={"Content-Type": "image/png"})
            photos = [photo(CLASSES + turn, shade) for shade in range(SHOTS)]
            began = time.perf_counter()
            new = add(client, space, f"new {turn}", photos)
            then = time.perf_counter()
            answer = client.call(
                "POST", f"/v1/spaces/{space}/classify", content=photos[0], headers={"Content-Type": "image/png"}
            ).json()
            ended = time.perf_counter()
            client.call("DELETE", f"/v1/spaces/{space}/classes/{new['class']['id']}")
            if turn < 3:
                continue
            added.append(then - began)
            asked.append(ended - then)
            result = answer["results"][0]
            # The photo belongs to the class, so its nearest evidence is of this class even with an untrained learner.
            knows = answer["revision"] == new["revision"] and result["evidence"][0]["class"] == new["class"]["id"]
            known += knows
            named += result["classes"][0]["id"] == new["class"]["id"]
    return {
        "add_ms": milliseconds(added),
        "classify_ms": milliseconds(asked),
        "both_ms": milliseconds([a + b for a, b in zip(added, asked, strict=True)]),
        "known": known,
        "likeliest": named,
    }


if __name__ == "__main__":
    main()
