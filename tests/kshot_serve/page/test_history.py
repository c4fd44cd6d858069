"""Undo, history and deletion, and what each says of what is gone for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
from playwright.sync_api import expect

Visit = Callable[..., Any]  # of conftest.py, as the others here
Shots = Callable[..., list[Any]]
Server = Any


def test_undo_takes_back_one_action_after_another_and_history_goes_anywhere(visit: Visit, shots: Shots) -> None:
    page = visit()
    page.begin("Undone")
    page.add("Red", shots("red", 2))
    page.add("Blue", shots("blue", 2))
    name = page.get_by_label("Name of the class Blue")
    name.fill("Azure")
    name.press("Enter")
    expect(page.card("Azure")).to_be_visible()
    undo = page.locator("#undo")
    undo.click()
    expect(page.card("Blue")).to_be_visible()
    undo.click()
    expect(page.locator("#cards .card")).to_have_count(1)
    undo.click()
    expect(page.locator("#cards .card")).to_have_count(0)
    undo.click()
    expect(page.locator("#toast")).to_contain_text("There is nothing to undo.")
    page.get_by_role("button", name="History").click()
    expect(page.locator("#past-list li")).to_have_count(7)
    page.get_by_role("button", name="Go back to revision 4").click()
    expect(page.card("Azure").locator(".tile img[src]")).to_have_count(2)


def test_undo_says_that_a_label_space_keeps_its_name(visit: Visit, shots: Shots) -> None:
    """Seen in review: it said "Undone.", and the name stayed: revisions do not hold it."""
    page = visit()
    page.begin("Called")
    page.add("Red", shots("red"))
    page.locator("#space-button").click()
    page.get_by_role("button", name="Rename…").click()
    page.locator("#naming-name").fill("Renamed")
    page.keyboard.press("Enter")
    expect(page.locator("#space-name")).to_have_text("Renamed")
    page.locator("#undo").click()
    expect(page.locator("#toast")).to_contain_text("A label space keeps its name")
    page.locator("#undo").click()
    expect(page.locator("#cards .card")).to_have_count(0)
    expect(page.locator("#toast")).to_contain_text("Undone.")


def test_deleting_asks_first_and_says_what_undo_cannot_bring_back(visit: Visit, shots: Shots) -> None:
    page = visit()
    page.begin("Deleted")
    page.add("Red", shots("red", 3))
    page.add("Blue", shots("blue", 2))
    page.get_by_role("button", name="Photo 2 of Red").click()
    expect(page.locator("#photo")).to_contain_text("gone for good")
    page.keyboard.press("Escape")
    expect(page.card("Red").locator(".count")).to_have_text("3 photos")
    page.get_by_role("button", name="Photo 2 of Red").click()
    page.get_by_role("button", name="Delete this photo").click()
    expect(page.card("Red").locator(".count")).to_have_text("2 photos")

    page.ask(shots("blue", first=9))
    expect(page.locator("#verdict")).to_have_text("Blue")
    page.get_by_role("button", name="Delete the class Blue").click()
    expect(page.locator("#confirm")).to_contain_text("2 photos will be deleted for good")
    page.get_by_role("button", name="Cancel").click()
    expect(page.card("Blue")).to_be_visible()
    page.get_by_role("button", name="Delete the class Blue").click()
    page.get_by_role("button", name="Delete class").click()
    expect(page.card("Blue")).to_have_count(0)
    expect(page.locator("#verdict")).not_to_have_text("Blue")  # asked again at once
    expect(page.locator("#evidence")).not_to_contain_text("Blue")
    page.locator("#undo").click()
    expect(page.locator("#toast")).to_contain_text("Nothing to undo: what was deleted does not come back.")


def test_undo_of_a_deletion_does_nothing_and_says_so_and_only_the_next_one_goes_further_back(
    server: Server, visit: Visit, shots: Shots
) -> None:
    """Seen in review: it said "Undone. 1 deleted item could not come back.", and nothing had been undone."""
    page = visit()
    space = server.url + page.begin("Gone")
    page.add("Red", shots("red", 3))
    page.add("Blue", shots("blue", 2))
    page.get_by_role("button", name="Photo 1 of Red").click()
    page.get_by_role("button", name="Delete this photo").click()
    toast = page.locator("#toast")
    expect(toast).to_contain_text("Photo deleted.")
    expect(toast.get_by_role("button")).to_have_count(0)  # an undo could not work
    page.locator("#undo").click()
    expect(toast).to_contain_text("Nothing to undo: what was deleted does not come back.")
    expect(toast).not_to_contain_text("Undone")
    assert httpx.get(space).json()["revision"] == 4  # none was made
    page.locator("#undo").click()
    expect(page.card("Blue")).to_have_count(0)
    expect(toast).to_contain_text("Undone.")
    expect(page.card("Red").locator(".count")).to_have_text("2 photos")
    page.locator("#undo").click()
    expect(page.locator("#cards .card")).to_have_count(0)
    page.locator("#undo").click()
    expect(toast).to_contain_text("There is nothing to undo.")
