"""The page at / in a real Chromium, before a real server; and a visitor, who does there what a person does."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KSHOT = Path(sys.executable).with_name("kshot")
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
BANNERS = """
    window.banners = []
    document.addEventListener('DOMContentLoaded', () => {
        const banner = document.getElementById('banner')
        const said = () => window.banners.push(banner.textContent)
        if (banner) new MutationObserver(said).observe(banner, {childList: true})
    })
"""

Photo = Callable[..., bytes]

expect.set_options(timeout=15_000)


@dataclass
class Server:
    """`kshot serve` in a process of its own, which may end and start again at the same address."""

    bundle: Path
    folder: Path
    keys: str = "off"
    port: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.folder.with_suffix(".log").open("a") as log:
            self.process = subprocess.Popen(
                [KSHOT, "serve", self.bundle, "--folder", self.folder, "--port", str(self.port), "--keys", self.keys],
                stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert self.process.stdout
        told = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", told)
        assert found, told + self.folder.with_suffix(".log").read_text()
        self.port = int(found[1])

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.communicate(timeout=30)
            self.process = None

    def key(self, scope: str) -> str:
        """A new API key."""
        made = subprocess.run(
            [KSHOT, "keys", "new", scope, "--scope", scope, "--folder", self.folder],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return made.stdout.split()[-1]


@dataclass
class Visitor:
    """A page and what people do on it. Whatever else it is asked for is Playwright's Page's."""

    page: Page

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)

    def begin(self, name: str) -> str:
        """Make a label space; its path in the API."""
        self.page.get_by_label("What do you want to tell apart?").fill(name)
        self.page.get_by_role("button", name="Start").click()
        expect(self.page.locator("#space-name")).to_have_text(name)
        return f"/v1/spaces/{self.page.url.split('#')[1]}"

    def add(self, name: str, photos: list[Any]) -> Locator:
        """A new class; its card."""
        self.page.get_by_label("New class", exact=True).fill(name)
        self.page.locator("#new-class-files").set_input_files(photos)
        expect(self.card(name).locator(".count")).to_have_text(re.compile(rf"^{len(photos)} photos?$"))
        return self.card(name)

    def card(self, name: str) -> Locator:
        return self.page.get_by_role("article", name=name, exact=True)

    def ask(self, photos: list[Any]) -> Locator:
        """Choose a photo to ask about; where the answer stands."""
        self.page.locator("#ask-file").set_input_files(photos)
        return self.page.locator("#verdict")

    def banners(self) -> list[str]:
        """What the banner has said since the page was opened, "" where it went; some of it is gone within a second."""
        return self.page.evaluate("banners")

    def drop(self, onto: str, photos: list[Any]) -> None:
        self.page.dispatch_event(onto, "drop", {"dataTransfer": self.carried(photos)})

    def carried(self, photos: list[Any]) -> Any:
        """What a drop or a paste carries."""
        files = [(each["name"], each["mimeType"], base64.b64encode(each["buffer"]).decode()) for each in photos]
        return self.page.evaluate_handle(
            """files => {
                const carried = new DataTransfer()
                for (const [name, type, text] of files)
                    carried.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, {type}))
                return carried
            }""",
            files,
        )

    def drop_from_disk(self, onto: str, *paths: Path) -> None:
        """As from a window of files: folders too, which no script can put into a drop."""
        box = self.page.locator(onto).bounding_box()
        assert box
        place = {"x": box["x"] + min(box["width"] / 2, 200), "y": box["y"] + min(box["height"] / 2, 40)}
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        session = self.page.context.new_cdp_session(self.page)
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "data": data} | place)
        session.detach()


@pytest.fixture(scope="session")
def server(features_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(features_bundle, tmp_path_factory.mktemp("page") / "open")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def locked(features_bundle: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that asks for keys."""
    server = Server(features_bundle, tmp_path / "closed", keys="required")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")  # no longer: Playwright's event loop runs in this thread until its end
def browser(photo: Photo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Its camera sees blue."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    film = tmp_path_factory.mktemp("camera") / "blue.y4m"
    with film.open("wb") as file:
        file.write(b"YUV4MPEG2 W320 H240 F10:1 Ip A1:1 C420jpeg\n")
        for shade in range(20):
            image = Image.open(io.BytesIO(photo("blue", shade, size=(320, 240)))).convert("YCbCr")
            light, *colours = image.split()
            file.write(b"FRAME\n" + light.tobytes() + b"".join(each.resize((160, 120)).tobytes() for each in colours))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-video-capture={film}",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def forgiven() -> list[str]:
    """Pieces of messages in the console that a test expects; any other warning or error there fails it."""
    return []


@pytest.fixture
def visit(browser: Browser, server: Server, forgiven: list[str]) -> Iterator[Callable[..., Visitor]]:
    """visit(path="/", at=URL, **context): the page in a browser of its own, which nothing may be asked elsewhere."""
    noise: list[str] = []
    contexts = []

    def console(message: ConsoleMessage) -> None:
        if message.type in ("warning", "error"):
            noise.append(message.text)

    def visit(path: str = "/", at: str = "", **options: Any) -> Visitor:
        contexts.append(browser.new_context(base_url=at or server.url, **(DESKTOP | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.add_init_script(BANNERS)
        page.on("console", console)
        page.on("filechooser", lambda chooser: None)  # from the start: asked for later, a key may come before it
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: _check_origin(request, at or server.url, noise))
        page.goto(path)
        return Visitor(page)

    yield visit
    for context in contexts:
        context.close()
    assert [each for each in noise if not any(piece in each for piece in forgiven)] == []


def _check_origin(request: Request, origin: str, noise: list[str]) -> None:
    if not request.url.startswith((f"{origin}/", "blob:", "data:")):
        noise.append(f"asked elsewhere: {request.url}")


@pytest.fixture
def shots(photo: Photo) -> Callable[..., list[Any]]:
    """shots("red", 3): three photos of red as a file chooser would give them."""

    def shots(colour: str, count: int = 1, first: int = 0) -> list[Any]:
        return [
            {"name": f"{colour}{i}.png", "mimeType": "image/png", "buffer": photo(colour, i)}
            for i in range(first, first + count)
        ]

    return shots
