"""How photos come in: the parts of a body, the bytes that decide, and what hostile ones may cost."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from kshot_serve.api.forms import _Parts
from kshot_serve.errors import Problem
from kshot_serve.settings import Settings
from kshot_serve.spaces.uploads import _together

Photo = Callable[..., bytes]
Running = Any  # of conftest.py

BOUNDARY = b"edge"


def part(name: str | None, content: bytes = b"x", *headers: bytes) -> bytes:
    disposition = [] if name is None else [b'Content-Disposition: form-data; name="%s"' % name.encode()]
    return b"\r\n".join([b"--edge", *disposition, *headers, b"", content, b""])


def read(body: bytes, step: int = 65536, **more: Any) -> Any:
    """What a body's parts are, fed in pieces; three photos of a thousand bytes at most."""
    asked = {"photos": ("photos",), "texts": ("name",), "most": 3, "photo_bytes": 1000} | more
    parts = _Parts(asked.pop("boundary", BOUNDARY), **asked)
    for start in range(0, len(body), step):
        parts.feed(body[start : start + step])
    return parts.end()


END = b"--edge--\r\n"


@pytest.mark.parametrize("step", [1, 2, 7, 65536])
def test_parts_are_found_however_the_body_is_cut(step: int) -> None:
    first, second = bytes(range(256)), b"\r\n--edg\r\n--edge"[:-1]
    form = read(part("name", "żółw".encode()) + part("photos", first) + part("photos", second) + END, step)
    assert form.texts == {"name": "żółw"}
    assert form.photos == {"photos": [first, second]}


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"", "bad_request", "cut short"),
        (part("photos"), "bad_request", "cut short"),
        (b"no parts at all", "bad_request", "no multipart/form-data"),
        (part("photos") + b"--edge-x", "bad_request", "cut short"),
        (part("image") + END, "bad_request", "the parts are `name` and `photos`"),
        (part(None) + END, "bad_request", "the parts are `name` and `photos`"),
        (part("name") + part("name") + END, "bad_request", "name came twice"),
        (part("name", b"\xff") + END, "bad_request", "name is not UTF-8"),
        (part("name", b"x" * 5000) + END, "bad_request", "at most 4,096 bytes"),
        (part("photos", b"x" * 1001) + END, "photo_too_large", "at most 1,000 bytes"),
        (part("photos") * 4 + END, "too_many_photos", "more than 3 photos"),
        (part("photos", b"x", *[b"X-%d: y" % i for i in range(20)]) + END, "bad_request", "no multipart/form-data"),
        (part("photos", b"x", b"X-Long: " + b"y" * 5000) + END, "bad_request", "no multipart/form-data"),
        (part("photos", b"x", b"X" * 5000 + b": y") + END, "bad_request", "no multipart/form-data"),
    ],
)
def test_a_body_that_is_wrong_is_refused_in_words(body: bytes, code: str, says: str) -> None:
    with pytest.raises(Problem) as refused:
        read(body)
    assert refused.value.code == code
    assert says in refused.value.message


@pytest.mark.parametrize("boundary", [b"", b"x" * 10_000])
def test_a_boundary_that_is_none_is_refused(boundary: bytes) -> None:
    with pytest.raises(Problem, match="no multipart/form-data"):
        read(part("photos") + END, boundary=boundary)


def test_ten_thousand_parts_are_refused_at_the_first_too_many() -> None:
    fed = _Parts(BOUNDARY, ("photos",), ("name",), 3, 1000)
    for _ in range(3):
        fed.feed(part("photos"))
    with pytest.raises(Problem, match="more than 3 photos"):
        fed.feed(part("photos") * 10_000)


def test_what_follows_the_last_boundary_costs_nothing() -> None:
    """CVE-2024-9056: characters behind the last boundary, each looked at and logged, stopped a server."""
    fed = _Parts(BOUNDARY, ("photos",), (), 3, 1000)
    fed.feed(part("photos") + END)
    started = time.perf_counter()
    for _ in range(500):
        fed.feed(b"-" * 65536)  # 32 MB
    assert time.perf_counter() - started < 5
    assert fed.end().photos == {"photos": [b"x"]}


def test_a_header_without_end_is_refused_while_it_comes() -> None:
    fed = _Parts(BOUNDARY, ("photos",), (), 3, 1000)
    fed.feed(b"--edge\r\nContent-Disposition: " + b"x" * 2000)
    with pytest.raises(Problem, match="no multipart/form-data"):
        fed.feed(b"x" * 100)


# Over HTTP ---------------------------------------------------------------------------------------------------------


def png(width: int, height: int, bits: int = 1) -> bytes:
    """A PNG of one colour, which packs a thousand to one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" * (1 + (width * bits + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def ask(server: Running, photo: bytes, kind: str = "image/png") -> httpx.Response:
    return server.http.post("/v1/embed", content=photo, headers={"Content-Type": kind})


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def resident() -> int:
    """Bytes of memory that this process has, where the server is a thread."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([3_000] * 8, [[3_000] * 5, [3_000] * 3]),
        ([50_000, 50_000], [[50_000], [50_000]]),
        ([100, 50_000, 100, 200], [[100], [50_000], [100, 200]]),
        ([700], [[700]]),
    ],
)
def test_small_photos_share_a_thread_and_large_ones_have_one_each(sizes: list[int], parts: list[list[int]]) -> None:
    photos = [bytes([number]) * size for number, size in enumerate(sizes)]
    found = list(_together(photos))
    assert [[len(photo) for photo in part] for part in found] == parts
    assert [photo for part in found for photo in part] == photos


def test_a_decompression_bomb_is_refused_by_its_header(server: Running) -> None:
    """17 KB that hold 144 megapixels: 1.1 s and 703 MB at Pillow's own limits, with no more than a warning."""
    bomb = png(12_000, 12_000)
    assert len(bomb) < 20_000
    before, took = resident(), []
    for _ in range(10):
        started = time.perf_counter()
        refused = ask(server, bomb)
        took.append(time.perf_counter() - started)
        assert code(refused) == (413, "photo_too_large")
    assert min(took) < 0.5  # decoded, it would take more than a second; bench/serve_fuzz.py measures
    assert resident() - before < 20_000_000


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((12_001, 20), (413, "photo_too_large")),
        ((5_001, 5_000), (413, "photo_too_large")),
        ((4_001, 4_000), (413, "photo_too_large")),
        ((7, 7), (422, "not_an_image")),
        ((201, 8), (422, "not_an_image")),
        ((1, 1), (422, "not_an_image")),
        ((1_000, 30), (422, "not_an_image")),
    ],
)
def test_sizes_are_bounded_before_pixels_are_decoded(
    server: Running, size: tuple[int, int], expected: tuple[int, str]
) -> None:
    """CVE-2026-22773: an image of one pixel stopped a server."""
    assert code(ask(server, png(*size))) == expected


def test_the_largest_and_the_smallest_photos_are_taken(server: Running) -> None:
    """16 megapixels of a PNG or WebP, 25 of a JPEG, which is decoded at a fraction of its size."""

    def jpeg(width: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (width, 5_000)).save(file, "JPEG")
        return file.getvalue()

    for sound in (png(4_000, 4_000), png(12_000, 480), png(8, 8), png(200, 8), jpeg(5_000)):
        assert ask(server, sound).status_code == 200
    assert code(ask(server, jpeg(5_001))) == (413, "photo_too_large")


@pytest.mark.parametrize("other", ["BMP", "GIF", "TIFF", "ICO", "PPM", "TGA", "JPEG2000"])
def test_only_three_formats_are_decoded_whatever_they_are_called(server: Running, other: str) -> None:
    """CVE-2026-40192 and its like: Pillow opens 43 formats, and some of their decoders had holes."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, other)
    for kind in ("image/png", f"image/{other.lower()}"):
        assert code(ask(server, file.getvalue(), kind)) == (422, "not_an_image")


def test_half_a_photo_is_none(server: Running, photo: Photo) -> None:
    """Pillow's open() and verify() both take half a JPEG; its missing half would be grey."""
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = photo("red", 0, kind, (64, 64))
        assert ask(server, whole).status_code == 200
        misnamed = [("photos", ("photo.gif", whole, "image/gif"))]
        assert server.http.post("/v1/embed", files=misnamed).status_code == 200
        refused = ask(server, whole[: len(whole) // 2])
        assert code(refused) == (422, "not_an_image")
        assert "0x" not in refused.text


def test_a_large_photo_is_refused_while_it_comes(server: Running) -> None:
    big = b"x" * 20_000_001
    assert code(ask(server, big)) == (413, "photo_too_large")
    refused = server.http.post("/v1/embed", files=[("photos", ("photo", big))])
    assert code(refused) == (413, "photo_too_large")


def test_too_many_photos_are_refused(server: Running, photo: Photo) -> None:
    """gh:bentoml/BentoML#3859: a limit in requests and none in images ran out of memory."""
    one = ("photos", ("photo", photo("red")))
    assert code(server.http.post("/v1/embed", files=[one] * 33)) == (422, "too_many_photos")


def test_a_photo_lies_upright_whichever_way_it_was_held(server: Running) -> None:
    """gh:ultralytics/ultralytics#23630: orientation was ignored on one of two paths, and 99 % became 96 %."""
    plain = Image.linear_gradient("L").convert("RGB")
    vectors = []
    for orientation in range(1, 9):
        undo = {
            1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
        }[orientation]  # fmt: skip
        turned = plain if undo is None else plain.transpose(undo)
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        turned.save(file, "PNG", exif=exif)
        vectors.append(ask(server, file.getvalue()).json()["vectors"][0])
    for other in vectors[1:]:
        assert other == pytest.approx(vectors[0], abs=1e-5)


def test_there_is_no_way_to_name_a_url_or_a_file(server: Running) -> None:
    """CVE-2026-33626: an image's URL was fetched for whoever asked, within a day of the advisory."""
    for address in ("http://127.0.0.1:1/x.png", "file:///etc/passwd", "/etc/passwd"):
        for sent in (
            {"json": {"photos": [address], "url": address}},
            {"data": {"photos": address}},
            {"files": [("photos", ("photo", address.encode()))]},
            {"files": [("url", ("url", address.encode()))]},
        ):
            refused = server.http.post("/v1/embed", **sent)
            assert refused.status_code in (400, 415, 422)
            assert "root:" not in refused.text


def test_a_body_may_take_its_time_as_long_as_it_comes(
    features_bundle: Path, tmp_path: Path, running: Callable[..., Any]
) -> None:
    """Seen in review: 57 MB from a page had 30 s, as 57 bytes had, so that a phone's photos never got through."""

    def slowly(*sizes: int) -> Iterator[bytes]:
        for size in sizes:
            yield b"x" * size
            time.sleep(0.1)

    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, body_s=0.5)
    with running(settings) as server:
        for sizes, expected in (
            ([20_000] * 12, (422, "not_an_image")),
            ([1_000] * 12, (408, "body_too_slow")),
            ([500_000] + [1_000] * 12, (408, "body_too_slow")),  # what came at once earns no more than it began with
        ):
            sent = server.http.post("/v1/embed", content=slowly(*sizes), headers={"Content-Type": "image/png"})
            assert code(sent) == expected
