"""One key that misbehaves, in four ways, beside eight clients of another key: what the others keep.

A real `kshot serve` with keys. The eight clients send small photos at half of the rate that they reach when they send
as fast as they are answered. Seconds without and with an attacker alternate. Attacks: bodies that are announced and
never sent, large photos that are asked for and never read, small PNGs of 25 megapixels, and heads without bodies.

The attacker computes on the same machine. So it is also let at a decoy, which answers 429 at once and does nothing else
(`apart`): what the others lose then, the machine takes from them and not the server.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import uvloop
from PIL import Image
from serving_load import (
    Connection,
    Sent,
    Served,
    add,
    arguments,
    bar,
    build,
    fill,
    form,
    meanwhile,
    milliseconds,
    photo,
    request,
    saturate,
    serving,
    write,
)

from kshot_client import Client

KEEPS, TIMES = 0.9, 2.0  # of their throughput; of their p99
SIDE = 84
WARM_S = 2.0  # from the attack's beginning until the others are measured
SETTLE_S = 5.0  # for what the attacker has left to be done


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="without and with each attack")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--load", type=float, default=0.5, help="of what the clients reach without pause")
    parser.add_argument("--attacks", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle, folder = build("protonet", Path(scratch) / "bundle", size=SIDE, channels=3), Path(scratch) / "server"
        good, bad = new_key(folder, "well-behaved"), new_key(folder, "misbehaving")
        with serving(bundle, folder, "--keys", "required") as server:
            with Client(server.url, key=good) as client:
                space = fill(client, 5, colour_photo)
            with Client(server.url, key=bad) as client:
                its_space = fill(client, 1, colour_photo, name="its own")
                large = add(client, its_space, "large", [long_png(15_000_000)])["photos"][0]
            path = f"/v1/spaces/{space}/classify"
            photos = [colour_photo(number % 5, 10 + number) for number in range(32)]
            requests = [request(path, each, "image/jpeg", X_API_Key=good) for each in photos]
            asyncio.run(saturate(server.port, requests, options.clients, 5.0))  # warm, and its memory grown
            sent = asyncio.run(saturate(server.port, requests, options.clients, 5.0))
            rate = options.load * sum(each.reply.status == 200 for each in sent) / 5.0
            print(
                f"{rate:.0f} requests a second: {options.load:.0%} of what {options.clients} clients reach", flush=True
            )
            target = Target(
                server.port, bad, f"/v1/spaces/{its_space}/photos/{large}", f"/v1/spaces/{its_space}/classify"
            )
            with decoy() as port:
                apart = Target(port, bad, target.photo, target.classify)
                found = {
                    name: compared(server, requests, rate, name, {"apart": apart, "with": target}, options)
                    for name in options.attacks
                }
            with Client(server.url, key=good) as client:
                live = client.call("GET", "/healthz/live").status_code
    what = f"{options.clients} clients of one key beside a misbehaving key; {rate:.0f} requests a second, conv4-64"
    bars = [judged for name, each in found.items() for judged in bars_of(name, each)]
    print(f"\n{'without, apart, with':22}{'a second':>24}{'p50 ms':>20}{'p99 ms':>22}{'429, 503':>10}{'memory':>9}")
    for name, each in found.items():
        ways = [
            ", ".join(str(each[way].get(key)) for way in ("without", "apart", "with"))
            for key in ("per_second", "p50", "p99")
        ]
        print(f"{name:22}{ways[0]:>24}{ways[1]:>20}{ways[2]:>22}{each['with']['refused']:>10}{each['memory_mb']:>9.0f}")
    bars.append(bar("liveness after all attacks", live, 200, live == 200))
    write(
        "serve_misbehaving",
        {"what": what, "rounds": options.rounds, "attacks": found, "bars": bars},
        "uvloop",
        "pillow",
    )


def compared(
    server: Served,
    requests: Sequence[bytes],
    rate: float,
    name: str,
    targets: dict[str, Target],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The others without an attack, with one at the decoy, and with one at their server, in turn."""
    groups: dict[str, list[Sent]] = {"without": [], "apart": [], "with": []}
    memory, attacker = [server.memory()], {way: Counter[str]() for way in targets}
    for _ in range(options.rounds):
        groups["without"] += asyncio.run(paced(server.port, requests, options.clients, rate, options.seconds))
        for way, target in targets.items():
            with attacked(ATTACKS[name], target, attacker[way]), meanwhile(lambda: memory.append(server.memory()), 0.2):
                time.sleep(WARM_S)
                groups[way] += asyncio.run(paced(server.port, requests, options.clients, rate, options.seconds))
            time.sleep(SETTLE_S)
    seconds = options.rounds * options.seconds
    found: dict[str, Any] = {key: figures(sent, seconds) for key, sent in groups.items()}
    found |= {
        "memory_mb": max(memory),
        "memory_grew_mb": round(max(memory) - memory[0], 1),
        "attacker": {way: dict(each) for way, each in attacker.items()},
    }
    print(name, json.dumps(found), flush=True)
    return found


def figures(sent: Sequence[Sent], seconds: float) -> dict[str, Any]:
    answered = [each.took for each in sent if each.reply.status == 200]
    statuses = Counter(each.reply.status for each in sent)
    refused = statuses[429] + statuses[503]
    return {
        "per_second": round(len(answered) / seconds, 1), **milliseconds(answered), "refused": refused,
        "failed": len(sent) - len(answered) - refused,
    }  # fmt: skip


def bars_of(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    without, beside = found["without"], found["with"]
    kept = beside["per_second"] / without["per_second"]
    slower = beside["p99"] / without["p99"] if "p99" in beside else 1e6  # none was answered
    lost = beside["refused"] + beside["failed"]
    return [
        bar(f"{name}: throughput of the others, of that without", round(kept, 3), KEEPS, kept >= KEEPS),
        bar(f"{name}: their p99, of that without", round(slower, 2), TIMES, slower <= TIMES),
        bar(f"{name}: their requests that were refused or failed", lost, 0, not lost),
    ]


async def paced(port: int, requests: Sequence[bytes], clients: int, rate: float, seconds: float) -> list[Sent]:
    """Clients that send at even times, `rate` a second together, each as soon as it can where it lags behind.

    Times are from when a request was due. What was not sent in time is not sent: it is lost throughput.
    """
    began, sent = time.perf_counter(), list[Sent]()

    async def client(number: int) -> None:
        connection = await Connection.to(port)
        for turn in range(number, int(rate * seconds), clients):
            due = turn / rate
            if (wait := due - (time.perf_counter() - began)) > 0:
                await asyncio.sleep(wait)
            if time.perf_counter() - began > seconds:
                break
            reply = await connection.ask(requests[turn % len(requests)])
            sent.append(Sent(due, time.perf_counter() - began - due, reply))
            if not connection.open:
                connection = await Connection.to(port)
        connection.close()

    await asyncio.gather(*[client(number) for number in range(clients)])
    return sent


# The attacker, in a separate process -----------------------------------------------------------------------------


class Target:
    """What an attacker knows: the port, its key, and the paths of a large photo and of a label space's questions."""

    def __init__(self, port: int, key: str, photo: str, classify: str) -> None:
        self.port = port
        self.photo = photo
        self.classify = classify
        self._key = key

    def head(self, method: str, path: str, *more: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {self._key}", *more, "", ""]
        return "\r\n".join(lines).encode()


class Decoy(asyncio.Protocol):
    """Answers 429 as soon as a head has come, and closes the connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self._transport.close()


@contextmanager
def decoy() -> Iterator[int]:
    """A decoy in a separate process, for the block; its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    process = multiprocessing.get_context("fork").Process(target=_lure, args=(listener,), daemon=True)
    process.start()
    try:
        yield listener.getsockname()[1]
    finally:
        process.kill()
        process.join()


def _lure(listener: socket.socket) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Decoy, sock=listener)
        await server.serve_forever()

    uvloop.run(serve())


Attack = Callable[[Target, Counter[str]], Coroutine[Any, Any, None]]


@contextmanager
def attacked(attack: Attack, target: Target, told: Counter[str]) -> Iterator[None]:
    """The attack goes on during the block; `told` counts what the attacker was answered."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_attack, args=(attack, target, theirs), daemon=True)
    process.start()
    try:
        yield
    finally:
        ours.send("end")
        if ours.poll(20):
            told.update(ours.recv())
        process.join(5)
        process.kill()


def _attack(attack: Attack, target: Target, pipe: Any) -> None:
    told = Counter[str]()

    async def until_told() -> None:
        task = asyncio.ensure_future(attack(target, told))
        while not pipe.poll():
            await asyncio.sleep(0.05)
            if task.done():
                task.result()
        task.cancel()

    asyncio.run(until_told())
    pipe.send(dict(told))


async def held(target: Target, head: bytes, told: Counter[str], *, reads: bool, seconds: float = 20.0) -> None:
    """One connection that sends a head and then nothing, and, unless it `reads`, leaves the answer where it is."""
    there = socket.socket()
    there.setblocking(False)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(there, ("127.0.0.1", target.port))
        await loop.sock_sendall(there, head)
        answer = await asyncio.wait_for(loop.sock_recv(there, 64 if reads else 12), seconds)
        told[answer[9:12].decode() or "closed"] += 1
        if answer[9:12] == b"200":
            await asyncio.sleep(seconds)
    except TimeoutError:
        told["open"] += 1
    except OSError:
        told["closed"] += 1
    finally:
        there.close()


async def held_by(many: int, target: Target, head: bytes, told: Counter[str], *, reads: bool) -> None:
    """So many such connections at any time; where one ends, another begins a little later."""

    async def one() -> None:
        while True:
            await held(target, head, told, reads=reads)
            await asyncio.sleep(0.1)

    await asyncio.gather(*[one() for _ in range(many)])


async def announced_bodies(target: Target, told: Counter[str]) -> None:
    head = target.head("POST", target.classify, "Content-Type: image/jpeg", "Content-Length: 64000000")
    await held_by(64, target, head, told, reads=True)


async def unread_answers(target: Target, told: Counter[str]) -> None:
    await held_by(60, target, target.head("GET", target.photo), told, reads=False)


async def pixel_bombs(target: Target, told: Counter[str]) -> None:
    """Four connections, 32 PNGs of 25 megapixels with alpha in each request."""
    body, kind = form([bomb()] * 32)
    head = target.head("POST", target.classify, f"Content-Type: {kind}", f"Content-Length: {len(body)}")

    async def one() -> None:
        while True:
            with suppress(OSError):
                connection = await Connection.to(target.port)
                reply = await connection.ask(head + body)
                told[str(reply.status)] += 1
                connection.close()
            await asyncio.sleep(0.05)

    await asyncio.gather(*[one() for _ in range(4)])


async def heads_without_bodies(target: Target, told: Counter[str]) -> None:
    """300 a second, each on a separate connection that is left open."""
    head = target.head("POST", target.classify, "Content-Type: image/jpeg", "Content-Length: 1000")
    held_now, began = set[asyncio.Task[None]](), time.perf_counter()
    for number in range(1_000_000):
        if (wait := number / 300 - (time.perf_counter() - began)) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(held(target, head, told, reads=True))
        held_now.add(task)
        task.add_done_callback(held_now.discard)


ATTACKS: dict[str, Attack] = {
    "announced bodies": announced_bodies,
    "unread answers": unread_answers,
    "pixel bombs": pixel_bombs,
    "heads without bodies": heads_without_bodies,
}


# Photos and keys ---------------------------------------------------------------------------------------------------


def colour_photo(of: int, shade: int = 0) -> bytes:
    return photo(of, shade, size=SIDE, channels=3, kind="JPEG")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 5000) -> bytes:
    """A PNG of 25 megapixels, RGBA, in about 100 kB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 4 * side)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def long_png(size: int) -> bytes:
    """A small PNG with a chunk of so many bytes that decoders pass over."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "red").save(file, "PNG")
    plain = file.getvalue()
    return plain[:-12] + chunk(b"kSht", bytes(size)) + plain[-12:]


def new_key(folder: Path, name: str) -> str:
    command = [Path(sys.executable).with_name("kshot"), "keys", "new", name, "--scope", "write", "--folder", folder]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
