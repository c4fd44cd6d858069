"""Questions a second with label spaces in SQLite and in Postgres, at 1, 8 and 32 clients.

    python bench/serve_databases.py postgresql://USER@HOST/DATABASE [--rounds 5] [--seconds 3]

One server on each database, alternating within each round; the ratio is of one round, of which the median counts.
Writes bench/results/serve_databases.json.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from serving_load import arguments, bar, build, fill, form, milliseconds, photo, request, saturate, serving, write

_BAR = 0.85  # of SQLite's questions a second


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("database", help="URL of an empty Postgres database")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = build("protonet", Path(scratch, "bundle"))
        with (
            serving(bundle, Path(scratch, "sqlite")) as sqlite,
            serving(bundle, Path(scratch, "postgres"), "--database", options.database) as postgres,
        ):
            servers = {"sqlite": sqlite, "postgres": postgres}
            asked = {}
            for name, served in servers.items():
                space = fill(served.client(), 5, photo, name=f"bench {time.time_ns()}")
                bodies = [form([photo(thing, 9, size=84, kind="JPEG")]) for thing in range(5)]
                asked[name] = [request(f"/v1/spaces/{space}/classify", *body) for body in bodies]
            rows: list[dict[str, Any]] = []
            for clients in options.clients:
                for number in range(options.rounds + 1):  # the first is to warm up
                    for name, served in servers.items():
                        sent = asyncio.run(saturate(served.port, asked[name], clients, options.seconds))
                        answered = [each for each in sent if each.reply.status == 200]
                        row = {
                            "database": name, "clients": clients, "round": number,
                            "per_s": len(answered) / options.seconds, "refused": 1 - len(answered) / len(sent),
                        }  # fmt: skip
                        if number:
                            rows.append(row | milliseconds([each.took for each in answered]))
                            print(rows[-1], flush=True)
    bars = []
    for clients in options.clients:
        rates = {
            name: [row["per_s"] for row in rows if (row["database"], row["clients"]) == (name, clients)]
            for name in servers
        }
        ratio = median(ours / theirs for ours, theirs in zip(rates["postgres"], rates["sqlite"], strict=True))
        bars.append(bar(f"Postgres of SQLite at {clients} clients", round(ratio, 3), _BAR, ratio >= _BAR))
    write("serve_databases", {"what": "questions a second by database", "rounds": rows, "bars": bars})
    return 0 if all(each["met"] for each in bars) else 1


if __name__ == "__main__":
    raise SystemExit(main())
