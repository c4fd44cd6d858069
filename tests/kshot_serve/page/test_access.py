"""Keys that are asked for and what they may do; a server that is busy, or away for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
from playwright.sync_api import Route, expect

Visit = Callable[..., Any]  # of conftest.py, as the others here
Shots = Callable[..., list[Any]]
Server = Any


def test_what_was_begun_is_still_there_when_the_server_is_back(visit: Visit, shots: Shots, forgiven: list[str]) -> None:
    forgiven.append("ERR_FAILED")
    page = visit()
    page.begin("Blip")
    page.add("Red", shots("red", 2))
    page.add("Blue", shots("blue", 2))
    page.locator("#new-class-files").set_input_files(shots("green", 2))
    page.get_by_label("New class", exact=True).fill("Gre")
    page.route("**/classify", lambda route: route.abort(), times=1)
    page.ask(shots("red", first=9))
    expect(page.locator("#verdict")).to_have_text("Red")  # asked again by itself
    expect(page.locator("#banner")).to_be_hidden()
    assert page.banners() == ["The server does not answer. Looking for it again every few seconds…", ""]
    expect(page.get_by_label("New class", exact=True)).to_have_value("Gre")
    expect(page.locator("#new-class-photos li")).to_have_count(2)


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(
    visit: Visit, shots: Shots, forgiven: list[str]
) -> None:
    forgiven.append("status of 429")
    page = visit()
    page.begin("Busy")
    page.add("Red", shots("red", 2))
    refused = []

    def busy(route: Route) -> None:
        """What the engine says when its queue is full, once; a queue cannot be filled on demand from outside."""
        if refused:
            return route.continue_()
        refused.append(route)
        words = {"error": {"code": "busy", "message": "256 images wait already", "request_id": "req_0"}}
        return route.fulfill(status=429, headers={"Retry-After": "1"}, json=words)

    page.route("**/classify", busy)
    page.ask(shots("red", first=9))
    expect(page.locator("#verdict")).to_have_text("Red")
    expect(page.locator("#banner")).to_be_hidden()
    assert page.banners() == ["The server is busy. Trying again in 1 second…", ""]
    first, second = page.evaluate(
        "performance.getEntriesByType('resource').filter(({name}) => name.endsWith('/classify'))"
        ".map(({startTime}) => startTime)"
    )
    assert second - first >= 1000


def test_a_key_is_asked_for_and_a_server_that_went_away_is_awaited(
    visit: Visit, shots: Shots, forgiven: list[str], locked: Server
) -> None:
    forgiven += ["status of 401", "ERR_CONNECTION_REFUSED", "status of 503"]
    key = locked.key("admin")
    page = visit(at=locked.url)
    field = page.get_by_label("API key")
    field.fill("kshot_ключ")  # no header can carry it
    field.press("Enter")
    expect(page.locator("#key-text")).to_contain_text("does not open this server")
    expect(field).to_have_value("")
    field.fill("kshot_wrong")
    field.press("Enter")
    expect(page.locator("#key-text")).to_contain_text("does not open this server")
    field.fill(key)
    page.get_by_role("button", name="Use this key").click()
    page.begin("Locked")
    page.add("Red", shots("red", 2))
    expect(page.locator("#cards .tile img[src]")).to_have_count(2)  # photos come with the key too
    page.locator("#code").click()
    expect(page.locator("#usage-curl")).to_contain_text("$KSHOT_KEY")
    expect(page.get_by_role("link", name="All of the API")).to_be_visible()  # which needs no key
    assert key not in page.content()
    page.keyboard.press("Escape")

    locked.stop()
    page.ask(shots("red", first=9))
    expect(page.locator("#banner")).to_contain_text("The server does not answer")
    expect(page.locator("#ask-problem")).to_have_text("The server does not answer.")  # nothing was to be saved
    page.get_by_label("Name of the class Red").fill("Crimson")
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_contain_text("What you just did may not have been saved.")
    locked.start()
    expect(page.locator("#banner")).to_be_hidden(timeout=30_000)
    expect(page.card("Red").locator(".count")).to_have_text("2 photos")
    expect(page.ask(shots("red", first=9))).to_have_text("Red")
    assert httpx.get(f"{locked.url}/v1/spaces").status_code == 401


def test_a_read_key_sees_what_is_there_and_asks_but_finds_nothing_to_change(
    visit: Visit, shots: Shots, forgiven: list[str], locked: Server
) -> None:
    """Seen in review: with a read key all buttons that write stayed, and each led to a refusal."""
    forgiven.append("status of 401")
    shown = {}
    for scope in ("admin", "read", "write"):
        page = visit(at=locked.url)
        page.get_by_label("API key").fill(locked.key(scope))
        page.keyboard.press("Enter")
        if scope == "admin":
            page.begin("Shared")
            page.add("Red", shots("red", 2))
            page.add("Blue", shots("blue", 2))
        else:
            expect(page.locator("#start [data-only=read]")).to_be_visible(visible=scope == "read")
            expect(page.locator("#new-space")).to_be_visible(visible=scope == "write")
            page.get_by_role("link", name="Shared").click()
        expect(page.locator("#cards .tile img[src]")).to_have_count(4)
        page.locator("#space-button").click()
        shown[scope] = {
            each: page.locator(each).first.is_visible()
            for each in (
                "#new-class", "#cards .bin", "#cards .filebutton", "#undo", "#strict-default", "#rename-space",
                "#export-space", "#delete-space",
            )
        }  # fmt: skip
        page.keyboard.press("Escape")
    assert all(shown["admin"].values())
    assert not any(shown["read"].values())
    assert [each for each, visible in shown["write"].items() if not visible] == ["#export-space", "#delete-space"]

    page = visit(at=locked.url)
    page.get_by_label("API key").fill(locked.key("read"))
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Shared").click()
    page.get_by_role("button", name="Photo 1 of Red").click()
    expect(page.locator("#photo-view img")).to_be_visible()
    expect(page.locator("#photo-delete")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Name of the class Red")).not_to_be_editable()
    expect(page.locator("#strict")).to_be_disabled()
    page.drop(".card", shots("red", first=5))
    page.drop("#classes", shots("red", first=5))
    page.get_by_role("button", name="History").click()
    expect(page.locator("#past-list li")).to_have_count(3)
    expect(page.get_by_role("button", name="Go back to revision 1")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.ask(shots("blue", first=9))).to_have_text("Blue")
    expect(page.card("Red").locator(".count")).to_have_text("2 photos")
