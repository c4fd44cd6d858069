"""Fuzz the decoder and the HTTP API with mutated JPEG, PNG and WebP files, and with decompression bombs.

    python bench/serve_fuzz.py [--files 100000] [--requests 10000] [--bundle FOLDER]
    python bench/serve_fuzz.py --replay 4711 > mutant

A mutant depends only on its number, so a finding is replayed by its number. The decoder runs in a child process
that records each number before decoding: a crash is attributed to its file, and a new child continues. Times are CPU
times, as the machine may be busy. Exits with 1 if a target is missed. Writes bench/results/serve_fuzz.json.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from kshot_runtime.images import ImageError, ImageRule, ImageTooLargeError, decode

Random = np.random.Generator
Part = tuple[bytes, bytes]  # of a file: its kind and what is in it

RULE = ImageRule(size=28, channels=3)
SLOW_S, GREW_MB = 1.0, 20.0
LEAKS = re.compile(rb"0x[0-9a-f]{4}|Traceback|/usr/|/home/|site-packages|PIL|libpng|libjpeg", re.IGNORECASE)
IDS = re.compile(rb"(spc|cls|pho)_[0-9a-z]{26}")  # random base64 text, parts of which may look like an address
CLIENTS = 4


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return child(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000, help="mutants for the decoder")
    parser.add_argument("--requests", type=int, default=10_000, help="mutants over HTTP")
    parser.add_argument("--bundle", type=Path, help="what the server serves; else an untrained ProtoNet")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="write this mutant to standard output, and end")
    parser.add_argument("--no-results", action="store_true", help="write no file")
    options = parser.parse_args()
    if options.replay is not None:
        sys.stdout.buffer.write(mutant(options.replay)[1])
        return 0
    from serving_load import write  # imports torch, which a child and a replay do not need

    with tempfile.TemporaryDirectory() as scratch:
        decoder = fuzz_decoder(options.files, Path(scratch))
        server = fuzz_server(options.requests, options.bundle, Path(scratch))
    bars = decoder.pop("bars") + server.pop("bars")
    if not options.no_results:
        what = f"{options.files:,} mutants through the decoder, {options.requests:,} over HTTP"
        write("serve_fuzz", {"what": what, "decoder": decoder, "server": server, "bars": bars}, "pillow")
    return 0 if all(each["met"] for each in bars) else 1


# Seeds: small sound files of every kind that the formats have -------------------------------------------------------


@cache
def seeds() -> tuple[tuple[str, bytes], ...]:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (5, 6, 4), np.uint8).repeat(8, 0).repeat(8, 1)  # (40, 48, RGBA)
    colour = Image.fromarray(blocks)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photo on its side"
    icc = b"\0" * 128 + struct.pack(">I", 0)
    deep = Image.fromarray(random.integers(0, 65536, (40, 48), np.uint16))
    frames: dict[str, Any] = {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}
    rgb = colour.convert("RGB")
    plain: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {}),
        (rgb, "JPEG", {"progressive": True, "exif": exif}),
        (rgb, "JPEG", {"restart_marker_blocks": 2, "subsampling": 0, "icc_profile": icc, "comment": b"hello"}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {}),
        *((colour.convert(mode), "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        (rgb.quantize(16), "PNG", {"transparency": 3, "bits": 4}),
        (rgb, "PNG", {"exif": exif, "icc_profile": icc, "dpi": (72, 72)}),
        (deep, "PNG", {}),
        (colour, "PNG", frames),
        (rgb, "WEBP", {}),
        (colour, "WEBP", {"lossless": True}),
        (colour, "WEBP", {"quality": 50, "exif": exif, "icc_profile": icc}),
        (colour, "WEBP", frames),
    ]
    return tuple((kind, save(image, kind, **settings)) for image, kind, settings in plain)


def save(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


# A file's parts, and a file of parts with right lengths and checksums -----------------------------------------------


def parts(kind: str, data: bytes) -> list[Part]:
    return list({"PNG": png_parts, "JPEG": jpeg_parts, "WEBP": webp_parts}[kind](data))


def png_parts(data: bytes) -> Iterator[Part]:
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def jpeg_parts(data: bytes) -> Iterator[Part]:
    at = 2
    while data[at + 1] not in (0xDA, 0xD9):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at : at + 2], data[at + 4 : at + 2 + length]
        at += 2 + length
    yield b"", data[at:]  # the scans


def webp_parts(data: bytes) -> Iterator[Part]:
    at = 12
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def joined(kind: str, pieces: list[Part]) -> bytes:
    match kind:
        case "PNG":
            chunks = (len(c).to_bytes(4, "big") + t + c + zlib.crc32(t + c).to_bytes(4, "big") for t, c in pieces)
            return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
        case "JPEG":
            segments = (t + ((len(c) + 2) & 0xFFFF).to_bytes(2, "big") + c if t else c for t, c in pieces)
            return b"\xff\xd8" + b"".join(segments)
        case _:
            body = b"".join(t + len(c).to_bytes(4, "little") + c + b"\0" * (len(c) % 2) for t, c in pieces)
            return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


# Mutants -----------------------------------------------------------------------------------------------------------


def mutant(number: int) -> tuple[str, bytes]:
    """The mutant with this number, and the mutations that made it."""
    random = np.random.default_rng((20_26, number))
    kind, data = seeds()[random.integers(len(seeds()))]
    how = MUTATIONS[random.integers(len(MUTATIONS))]
    data = how(random, kind, data)
    if random.random() < 0.2:
        data = bits(random, kind, data)
    return how.__name__, data


def bits(random: Random, kind: str, data: bytes) -> bytes:
    """Flip some bits, half of the time in the header."""
    changed = bytearray(data)
    reach = min(len(changed), 64 if random.random() < 0.5 else len(changed))
    for _ in range(random.integers(1, 17)):
        if reach:
            changed[random.integers(reach)] ^= 1 << int(random.integers(8))
    return bytes(changed)


def numbers(random: Random, kind: str, data: bytes) -> bytes:
    """Replace values by boundary values."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 5)):
        value = random.choice(
            [b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\0"]
        )
        at = random.integers(len(changed))
        changed[at : at + len(value)] = value
    return bytes(changed)


def cut(random: Random, kind: str, data: bytes) -> bytes:
    return data[: random.integers(len(data))]


def hole(random: Random, kind: str, data: bytes) -> bytes:
    start, end = sorted(random.integers(len(data), size=2))
    return data[:start] + data[end:]


def repeated(random: Random, kind: str, data: bytes) -> bytes:
    start, end = sorted(random.integers(len(data), size=2))
    return data[:end] + data[start:end] * int(random.integers(1, 9)) + data[end:]


def spliced(random: Random, kind: str, data: bytes) -> bytes:
    """Join the head of one file and the tail of another, of any formats."""
    other = seeds()[random.integers(len(seeds()))][1]
    return data[: random.integers(len(data))] + other[random.integers(len(other)) :]


def shuffled(random: Random, kind: str, data: bytes) -> bytes:
    """Drop, duplicate or move parts, or take them from another file of the format."""
    pieces = parts(kind, data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(len(pieces)))
        match random.integers(4):
            case 0 if len(pieces) > 1:
                del pieces[at]
            case 1:
                pieces.insert(int(random.integers(len(pieces) + 1)), pieces[at])
            case 2:
                pieces.append(pieces.pop(at))
            case _:
                pieces.insert(at, a_part(random, kind))
    return joined(kind, pieces)


def edited(random: Random, kind: str, data: bytes) -> bytes:
    """Change one part, or its length, and correct lengths and checksums."""
    pieces = parts(kind, data)
    at = int(random.integers(len(pieces)))
    name, content = pieces[at]
    if content:
        content = (bits, numbers, cut, hole, repeated)[random.integers(5)](random, kind, content)
    pieces[at] = name, content
    return joined(kind, pieces)


def resized(random: Random, kind: str, data: bytes) -> bytes:
    """Change the header's size, depth or number of channels."""
    pieces = parts(kind, data)
    heads = {b"IHDR", b"fcTL", b"acTL", b"VP8X", b"VP8 ", b"VP8L", b"ANMF", b"\xff\xc0", b"\xff\xc2"}
    at = int(random.choice([i for i, (name, _) in enumerate(pieces) if name in heads]))
    content = bytearray(pieces[at][1])
    reach = min(len(content), 16)
    for _ in range(random.integers(1, 4)):
        where = int(random.integers(reach))
        content[where] = int(random.choice([0, 1, 2, 3, 4, 6, 8, 16, 0x10, 0x20, 0x40, 0x7F, 0x80, 0xFF]))
    pieces[at] = pieces[at][0], bytes(content)
    return joined(kind, pieces)


def repacked(random: Random, kind: str, data: bytes) -> bytes:
    """Change a PNG's rows before compression, so that its stream is valid; other formats as in `edited`."""
    if kind != "PNG":
        return edited(random, kind, data)
    pieces = parts(kind, data)
    packed = b"".join(content for name, content in pieces if name == b"IDAT")
    rows = (bits, numbers, cut, hole, repeated)[random.integers(5)](random, kind, zlib.decompress(packed))
    first = next(i for i, (name, _) in enumerate(pieces) if name == b"IDAT")
    kept = [piece for piece in pieces if piece[0] != b"IDAT"]
    return joined(kind, [*kept[:first], (b"IDAT", zlib.compress(rows)), *kept[first:]])


def confused(random: Random, kind: str, data: bytes) -> bytes:
    """Put the magic number of another, or of an unsupported, format before a body."""
    magic = random.choice(
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"RIFF\xff\xff\0\0WEBPVP8 ", b"GIF89a", b"BM", b"II*\0",
         b"%PDF-1.7\n", b"%!PS-Adobe", b"SIMPLE  =", b"PK\3\4", b"\0\0\0\x0cjP  \r\n\x87\n", b"<svg ", b"MM\0*"]
    )  # fmt: skip
    return magic + data[len(magic) if random.random() < 0.5 else 0 :]


def polyglot(random: Random, kind: str, data: bytes) -> bytes:
    """Append another file, or embed it in a part with arbitrary content."""
    other = seeds()[random.integers(len(seeds()))][1]
    if random.random() < 0.3:
        return data + other
    pieces = parts(kind, data)
    named = {"PNG": [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP"], "WEBP": [b"XMP ", b"EXIF", b"ICCP", b"ALPH"]}
    name = random.choice(named.get(kind, [b"\xff\xfe", b"\xff\xe1", b"\xff\xe2", b"\xff\xee"]))
    head = random.choice([b"", b"Comment\0\0", b"Exif\0\0", b"ICC_PROFILE\0\1\1"])
    pieces.insert(int(random.integers(len(pieces))), (bytes(name), bytes(head) + other))
    return joined(kind, pieces)


def a_part(random: Random, kind: str) -> Part:
    others = [data for named, data in seeds() if named == kind]
    pieces = parts(kind, others[random.integers(len(others))])
    return pieces[random.integers(len(pieces))]


MUTATIONS: tuple[Callable[[Random, str, bytes], bytes], ...] = (
    bits, numbers, cut, hole, repeated, spliced, shuffled, edited, resized, repacked, confused, polyglot,
)  # fmt: skip


# The decoder -------------------------------------------------------------------------------------------------------


def child(first: int, count: int, notes: Path) -> int:
    """Decode these mutants and print the outcomes; `notes` holds the current number."""
    outcomes: dict[str, Counter[str]] = {how.__name__: Counter() for how in MUTATIONS}
    slowest: list[tuple[float, int, str]] = []
    broken: list[tuple[int, str]] = []
    memory: list[float] = []
    with notes.open("wb", buffering=0) as note:
        for number in range(first, first + count):
            note.seek(0)
            note.write(b"%12d" % number)
            how, data = mutant(number)
            began = time.process_time()
            try:
                decode(data, RULE)
                outcome = "decoded"
            except ImageTooLargeError:
                outcome = "too large"
            except ImageError:
                outcome = "refused"
            except BaseException as error:
                outcome = "broken"
                broken.append((number, type(error).__name__))
            slowest = sorted([*slowest, (time.process_time() - began, number, how)])[-5:]
            outcomes[how][outcome] += 1
            if number % 1000 == 0:
                memory.append(resident())
    memory.append(resident())
    print(json.dumps({"outcomes": outcomes, "slowest": slowest, "broken": broken, "memory": memory}))
    return 0


def resident(process: str | int = "self", field: str = "VmRSS") -> float:
    """Resident memory in MB."""
    return int(re.findall(rf"{field}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0]) / 1000


def fuzz_decoder(files: int, scratch: Path) -> dict[str, Any]:
    from serving_load import bar

    outcomes: dict[str, Counter[str]] = {}
    found: dict[str, list[Any]] = {"slowest": [], "broken": [], "memory": []}
    crashes: list[dict[str, int]] = []
    first, notes = 0, scratch / "number"
    began = time.perf_counter()
    while first < files:
        command = [sys.executable, __file__, "--child", str(first), str(files - first), str(notes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            told = json.loads(done.stdout)
            for how, counts in told["outcomes"].items():
                outcomes.setdefault(how, Counter()).update(counts)
            for name, values in found.items():
                values += told[name]
            break
        at = int(notes.read_text())
        crashes.append({"mutant": at, "returncode": done.returncode})
        print(f"mutant {at} ended the process with {done.returncode}", flush=True)
        first = at + 1
    total = sum(outcomes.values(), Counter())
    for how, counts in outcomes.items():
        print(
            f"{how:10} "
            + ", ".join(f"{counts[each]:6} {each}" for each in ("decoded", "refused", "too large", "broken"))
        )
    slowest = sorted(found["slowest"])[-5:][::-1]
    warm = found["memory"][len(found["memory"]) // 5] if found["memory"] else 0.0
    grew = (found["memory"][-1] if found["memory"] else 0.0) - warm
    return {
        "mutants": files,
        "seconds": round(time.perf_counter() - began, 1),
        "outcomes": {how: dict(counts) for how, counts in outcomes.items()},
        "decoded_share": round(total["decoded"] / max(1, total.total()), 3),
        "slowest": [{"mutant": number, "how": how, "ms": round(1000 * took, 1)} for took, number, how in slowest],
        "broken": found["broken"],
        "crashes": crashes,
        "bars": [
            bar("crashes of the decoder", len(crashes), 0, not crashes),
            bar("errors that are none of the decoder's own", len(found["broken"]), 0, not found["broken"]),
            bar("slowest file", round(slowest[0][0], 3), SLOW_S, slowest[0][0] < SLOW_S, "s of processor"),
            bar("memory growth from a fifth of the way to the end", round(grew, 1), GREW_MB, grew < GREW_MB, "MB"),
        ],
    }


# The server --------------------------------------------------------------------------------------------------------


def fuzz_server(requests: int, bundle: Path | None, scratch: Path) -> dict[str, Any]:
    from serving_load import bar, build, fill, photo, serving

    source = bundle or build("protonet", scratch / "bundle")
    with serving(source, scratch / "serve") as served:
        space = fill(served.client(), 3, photo, shots=2)
        path = f"/v1/spaces/{space}/classify"
        bombs = [drop(served, path, name, file) for name, file in decompression_bombs()]
        before = resident(served.process.pid)
        statuses, slowest, leaks = asyncio.run(post(served.port, path, requests))
        after = resident(served.process.pid)
        asked = served.client().call("GET", "/healthz/ready").status_code
        took = [each["ms"] for each in bombs]
        grown = [each["grew_mb"] for each in bombs]
        unexpected = sum(count for status, count in statuses.items() if status not in (200, 413, 422))
        return {
            "requests": requests,
            "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "slowest_ms": round(1000 * slowest[0], 1),
            "slowest_mutant": slowest[1],
            "memory_mb": [round(before, 1), round(after, 1)],
            "bombs": bombs,
            "bars": [
                bar("answers over HTTP but 200, 413 and 422", unexpected, 0, unexpected == 0 and asked == 200),
                bar("answers that tell more than they should", len(leaks), 0, not leaks),
                bar("slowest answer over HTTP", round(slowest[0], 3), SLOW_S, slowest[0] < SLOW_S, "s"),
                bar("memory growth of the server", round(after - before, 1), 100.0, after - before < 100.0, "MB"),
                bar("bombs not refused", sum(each["status"] not in (413, 422) for each in bombs), 0,
                    all(each["status"] in (413, 422) for each in bombs)),
                bar("slowest refusal of a bomb", max(took), 50, max(took) < 50, "ms"),
                bar("most memory that a bomb took", max(grown), 20, max(grown) < 20, "MB"),
            ],
        }  # fmt: skip


async def post(port: int, path: str, count: int) -> tuple[Counter[int], tuple[float, int], list[int]]:
    """POST mutants singly, or every eighth time four in a form; statuses, the slowest, and leaks of internals."""
    from serving_load import Connections, form, request

    connections, numbers_left = Connections(port), itertools.count()
    statuses: Counter[int] = Counter()
    slowest, leaks = (0.0, -1), []

    async def client() -> None:
        nonlocal slowest
        while (number := next(numbers_left)) < count:
            if number % 8 == 7:
                sent = request(path, *form([mutant(number + i)[1] for i in range(4)]))
            else:
                sent = request(path, mutant(number)[1], "image/jpeg")
            began = time.perf_counter()
            reply = await connections.ask(sent)
            slowest = max(slowest, (time.perf_counter() - began, number))
            statuses[reply.status] += 1
            if LEAKS.search(IDS.sub(b"", reply.body)):
                leaks.append(number)

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    connections.close()
    return statuses, slowest, leaks


def decompression_bombs() -> list[tuple[str, bytes]]:
    """Small files that decode to 144 megapixels or more."""
    side = 12_000
    flat = save(Image.new("1", (side, side)), "PNG", optimize=True)
    webp = save(Image.new("RGB", (64, 64)), "WEBP", lossless=True)
    bits_of_size = ((16_383 - 1) | (16_383 - 1) << 14).to_bytes(4, "little")
    pieces = parts("WEBP", webp)
    pieces[0] = pieces[0][0], pieces[0][1][:1] + bits_of_size + pieces[0][1][5:]
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000, 9))
    chunks = parts("PNG", save(Image.new("L", (64, 64)), "PNG"))
    return [
        (f"PNG of {side} x {side}, {len(flat):,} bytes", flat),
        ("WebP of 16383 x 16383", joined("WEBP", pieces)),
        ("PNG of 64 x 64 with 100 MB of packed text", joined("PNG", [chunks[0], text, *chunks[1:]])),
    ]


def drop(served: Any, path: str, name: str, file: bytes) -> dict[str, Any]:
    """Costs of a decompression bomb: the best time of five, as the machine may be busy, and the memory of all."""
    http = httpx.Client(base_url=served.url, timeout=60)
    headers = {"content-type": "image/png"}
    http.post(path, content=b"no photo", headers=headers)  # the connection is established
    Path(f"/proc/{served.process.pid}/clear_refs").write_text("5")  # resets the peak of resident memory
    before, took = resident(served.process.pid), []
    for _ in range(5):
        began = time.perf_counter()
        status = http.post(path, content=file, headers=headers).status_code
        took.append(time.perf_counter() - began)
    grew = resident(served.process.pid, "VmHWM") - before
    print(f"{name}: {status}, {1000 * min(took):.1f} to {1000 * max(took):.1f} ms, {grew:.1f} MB")
    return {"file": name, "bytes": len(file), "status": status, "ms": round(1000 * min(took), 1),
            "ms_worst": round(1000 * max(took), 1), "grew_mb": round(grew, 1)}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
