"""Classes made of photos that are chosen, dropped and pasted; what is refused is listed."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

from PIL import Image
from playwright.sync_api import Request, Route, expect

Visit = Callable[..., Any]  # of conftest.py, as the others here
Shots = Callable[..., list[Any]]


def test_photos_are_dropped_and_pasted_and_a_bad_one_among_them_is_named(
    visit: Visit, shots: Shots, forgiven: list[str]
) -> None:
    forgiven.append("status of 422")  # Chromium's own note on the refusal
    page = visit()
    page.begin("Dropped")
    bad = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"nothing like a photo"}
    page.drop("#new-class", [*shots("green", 2), bad])
    expect(page.get_by_text("Now give it a name.", exact=True).first).to_be_visible()
    expect(page.get_by_label("New class", exact=True)).to_be_focused()
    page.keyboard.type("Green")
    page.keyboard.press("Enter")
    expect(page.card("Green").locator(".count")).to_have_text("2 photos")
    problems = page.locator("#new-class .problems li")
    expect(problems).to_have_count(1)
    expect(problems).to_have_text("notes.txt: This file is not a photo.")
    expect(page.locator("#toast")).to_contain_text("2 photos of Green added.")

    page.drop("#cards .card", shots("green", first=5))
    expect(page.card("Green").locator(".count")).to_have_text("3 photos")
    page.get_by_role("button", name="History").focus()  # out of the classes: pasting asks
    carried = page.carried(shots("green", first=7))
    page.evaluate(
        "carried => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: carried, cancelable: true}))",
        carried,
    )
    expect(page.locator("#verdict")).to_have_text("Green")
    page.ask([bad])
    expect(page.locator("#ask-problem")).to_have_text("This file is not a photo.")


def test_a_photo_beyond_the_servers_limits_is_drawn_smaller_in_the_browser(visit: Visit) -> None:
    page = visit()
    page.begin("Large")
    file = io.BytesIO()
    Image.new("RGB", (6400, 4800), (230, 20, 20)).save(file, "JPEG")  # 30.7 million pixels; 25 are taken
    page.add("Red", [{"name": "large.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}])
    gif = io.BytesIO()
    Image.new("RGB", (32, 32), (230, 20, 20)).save(gif, "GIF")  # a format that the server does not take
    expect(page.ask([{"name": "red.gif", "mimeType": "image/gif", "buffer": gif.getvalue()}])).to_have_text("Red")


def test_photos_that_come_while_a_class_is_made_wait_for_the_next_and_refused_ones_stay(
    visit: Visit, shots: Shots, forgiven: list[str]
) -> None:
    forgiven.append("status of 409")
    page = visit()
    page.begin("Meanwhile")
    held: list[Route] = []
    page.route("**/classes", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    page.get_by_label("New class", exact=True).fill("Red")
    page.locator("#new-class-files").set_input_files(shots("red", 2))
    while not held:
        page.wait_for_timeout(20)
    page.drop("#new-class", shots("blue", 3))
    [route] = held
    route.continue_()
    page.unroute("**/classes")
    expect(page.card("Red").locator(".count")).to_have_text("2 photos")
    waiting = page.locator("#new-class-photos li")
    expect(waiting).to_have_count(3)
    expect(page.locator("#new-class-hint")).to_have_text("Now give it a name.")

    name = page.get_by_label("New class", exact=True)
    name.fill("Red")
    name.press("Enter")
    expect(page.locator("#new-class .problems")).to_contain_text("a class named 'Red' already")
    expect(waiting).to_have_count(3)
    name.fill("Blue")
    name.press("Enter")
    expect(page.card("Blue").locator(".count")).to_have_text("3 photos")
    expect(waiting).to_have_count(0)


def test_the_next_class_may_be_named_while_one_is_made(visit: Visit, shots: Shots) -> None:
    page = visit()
    page.begin("Quick")
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if route.request.method == "POST" and not held:
            held.append(route)
        else:
            route.continue_()

    page.route("**/classes", hold_the_first)
    name = page.get_by_label("New class", exact=True)
    name.fill("Red")
    page.locator("#new-class-files").set_input_files(shots("red", 2))
    while not held:
        page.wait_for_timeout(20)
    page.drop("#new-class", shots("blue", 3))
    expect(page.locator("#new-class-photos li")).to_have_count(5)
    name.fill("Blue")
    name.press("Enter")
    held[0].continue_()
    for colour, photos in (("Red", 2), ("Blue", 3)):
        expect(page.card(colour).locator(".count")).to_have_text(f"{photos} photos")
    expect(name).to_have_value("")


def test_photos_go_in_requests_that_a_slow_line_can_send_in_time(visit: Visit) -> None:
    page = visit()
    page.begin("Slow line")
    photos = []
    for seed in range(3):  # of 3 MB each
        file = io.BytesIO()
        Image.frombytes("RGB", (1000, 1000), random.Random(seed).randbytes(3_000_000)).save(file, "PNG")
        photos.append({"name": f"{seed}.png", "mimeType": "image/png", "buffer": file.getvalue()})
    requests: list[Request] = []
    page.on("requestfinished", lambda request: requests.append(request))
    page.add("Noise", photos)
    sizes = [int(each.header_value("content-length") or 0) for each in requests if each.method == "POST"]
    assert len(sizes) > 1
    assert max(sizes) < 8_100_000
