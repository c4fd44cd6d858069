"""Questions a second with label spaces in SQLite and in Postgres, and of an older server, at 1, 8 and 32 clients.

    python bench/serve_databases.py postgresql://USER@HOST [--before CHECKOUT] [--rounds 5] [--seconds 3]

A server for each database, and with --before for each of the two checkouts, all with the same bundle: ProtoNet on an
untrained conv4-64, and on EfficientNet-Lite0. They alternate within each round; ratios are of one round, of which the
median counts. URL is of a Postgres where this user may make databases. Writes bench/results/serve_databases.json.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from serving_load import (
    Served,
    arguments,
    bar,
    build,
    fill,
    form,
    milliseconds,
    photo,
    request,
    saturate,
    serving,
    write,
)
from sqlalchemy import create_engine, make_url, text

WAYS = 5
OF_SQLITE, REFUSED = 0.85, 0.05
SIDES = {"conv4": (28, 1), "efficientnet-lite0": (96, 3)}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("database", help="URL of a Postgres")
    parser.add_argument("--before", type=Path, help="a checkout of another commit, to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--backbones", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    rows = [row for backbone in options.backbones for row in measured(backbone, options)]
    bars = bars_of(rows)
    write("serve_databases", {"what": "questions a second by database", "rounds": rows, "bars": bars})
    return 0 if all(each["met"] for each in bars) else 1


def measured(backbone: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each server, number of clients and round."""
    size, channels = SIDES[backbone]
    rows = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        bundle = build("protonet", Path(scratch, "bundle"), size=size, channels=channels, backbone=backbone)
        codes = {"now": None} | ({"before": options.before} if options.before else {})
        servers = {}
        for database, code in product(("sqlite", "postgres"), codes):
            path = "" if database == "sqlite" else stack.enter_context(new_database(options.database))
            more = ["--database", path] if path else []
            environment = {"PYTHONPATH": ":".join(str(checkout / each) for each in ("core", "plugins", "flows"))
                           } if (checkout := codes[code]) else None  # fmt: skip
            folder = Path(scratch, f"{database}-{code}")
            served = stack.enter_context(serving(bundle, folder, *more, environment=environment))
            servers[database, code] = served, questions(served, size, channels)
        for clients in options.clients:
            for number in range(options.rounds + 1):  # the first is to warm up
                for (database, code), (served, requests) in servers.items():
                    row = {
                        "backbone": backbone,
                        "database": database,
                        "code": code,
                        "clients": clients,
                        "round": number,
                    }
                    row |= rate(served, requests, clients, options.seconds)
                    if number:
                        rows.append(row)
                        print(row, flush=True)
    return rows


def questions(served: Served, size: int, channels: int) -> list[bytes]:
    def jpeg(thing: int, shade: int) -> bytes:
        return photo(thing, shade, size=size, channels=channels, kind="JPEG")

    with served.client() as client:
        space = fill(client, WAYS, jpeg)
    return [request(f"/v1/spaces/{space}/classify", *form([jpeg(thing, 9)])) for thing in range(WAYS)]


def rate(served: Served, requests: Sequence[bytes], clients: int, seconds: float) -> dict[str, Any]:
    sent = asyncio.run(saturate(served.port, requests, clients, seconds))
    answered = [each for each in sent if each.reply.status == 200]
    share = 1 - len(answered) / len(sent)
    return {"per_s": len(answered) / seconds, "refused": share, **milliseconds([each.took for each in answered])}


@contextmanager
def new_database(server: str) -> Iterator[str]:
    """The URL of a new database, which is dropped behind the block."""
    name = f"bench_{uuid.uuid4().hex[:12]}"
    engine = create_engine(make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            yield make_url(server).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def bars_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    bars = []
    for backbone, clients in sorted({(row["backbone"], row["clients"]) for row in rows}):

        def of(
            database: str, code: str, key: str = "per_s", where: tuple[str, int] = (backbone, clients)
        ) -> list[float]:
            wanted = (*where, database, code)
            return [
                row[key] for row in rows if (row["backbone"], row["clients"], row["database"], row["code"]) == wanted
            ]

        def ratio(ours: list[float], theirs: list[float]) -> float:
            return round(median(a / b for a, b in zip(ours, theirs, strict=True)), 3)

        what = f"{backbone}, {clients} clients"
        if backbone == "conv4":
            share = ratio(of("postgres", "now"), of("sqlite", "now"))
            bars.append(bar(f"{what}: Postgres of SQLite", share, OF_SQLITE, share >= OF_SQLITE))
        refused = round(median(of("sqlite", "now", "refused")), 4)
        bars.append(bar(f"{what}: refused", refused, REFUSED, refused < REFUSED))
        for database in ("sqlite", "postgres"):
            if before := of(database, "before"):
                share = ratio(of(database, "now"), before)
                bars.append(bar(f"{what}: {database}, of before", share, 1.0, share >= 1.0))
    return bars


if __name__ == "__main__":
    raise SystemExit(main())
