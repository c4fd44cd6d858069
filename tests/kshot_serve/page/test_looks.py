"""By keyboard alone, on a phone, in the dark: everything is reached and read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

Visit = Callable[..., Any]  # of conftest.py, as the others here
Shots = Callable[..., list[Any]]


def test_everything_goes_by_keyboard_and_has_a_name(visit: Visit, shots: Shots) -> None:
    page = visit()
    expect(page.get_by_label("What do you want to tell apart?")).to_be_focused()
    page.keyboard.type("Keys")
    page.keyboard.press("Enter")
    expect(page.get_by_label("New class", exact=True)).to_be_focused()
    for name in ("Red", "Blue"):
        page.keyboard.type(name)
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")  # no photos yet: choose some
        chooser.value.set_files(shots(name.lower(), 2))
        expect(page.card(name)).to_be_visible()
        expect(page.get_by_label("New class", exact=True)).to_have_value("")

    seen = []
    with page.expect_file_chooser() as chooser:
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                """() => {
                    const it = document.activeElement, label = it.labels?.[0]
                    const ringed = it.classList.contains('hidden-input') ? label : it
                    const name = it.ariaLabel ?? label?.innerText ?? it.innerText
                    return [it.id, getComputedStyle(ringed).outlineStyle, name]
                }"""
            )
            seen.append(focused)
            if focused[0] == "ask-file":
                page.keyboard.press("Space")
                break
    chooser.value.set_files(shots("blue", first=9))
    expect(page.locator("#verdict")).to_have_text("Blue")
    assert all(ring != "none" and name for _, ring, name in seen), seen
    assert {"Delete the class Red", "Photo 1 of Blue", "Name of the class Red"} <= {name for *_, name in seen}

    page.get_by_role("button", name="Photo 1 of Red").focus()
    page.keyboard.press("Delete")
    expect(page.locator("#photo")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Photo 1 of Red")).to_be_focused()
    page.locator("#strict").focus()
    page.keyboard.press("End")
    expect(page.locator("#strict")).to_have_attribute("aria-valuetext", re.compile(r"^50\s% of known photos pass"))
    expect(page.locator("#moved")).to_contain_text("after the new strictness")
    page.locator("#code").focus()
    page.keyboard.press("Enter")
    space = page.url.split("#")[1]
    expect(page.locator("#usage-curl")).to_contain_text(f"/v1/spaces/{space}/classify")
    expect(page.locator("#usage-python")).to_contain_text('client.space("Keys")')


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_one_column_big_targets_and_text_that_can_be_read(visit: Visit, shots: Shots, scheme: str) -> None:
    page = visit(**PHONE, color_scheme=scheme)
    page.begin(f"A label space with quite a long name, for a {scheme} screen as small as this one")
    page.add("Red", shots("red", 3))
    page.add("A_class_whose_name_does_not_fit_into_one_line_of_a_phone", shots("blue", 2))
    for tab in ("Classes", "What is this?"):
        page.get_by_role("button", name=tab).click()
        if tab != "Classes":
            expect(page.ask(shots("white"))).to_have_text("None of these")
        expect(page.locator("#classes")).to_be_visible(visible=tab == "Classes")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate(SMALL_TARGETS) == []
        assert page.evaluate(FAINT_TEXTS) == []


SMALL_TARGETS = """() => [...document.querySelectorAll('button, a[href], label.filebutton, input:not(.hidden-input)')]
    .filter(it => it.checkVisibility({visibilityProperty: true}))
    .map(it => [it.outerHTML.slice(0, 80), it.getBoundingClientRect()])
    .filter(([, box]) => box.width < 44 || box.height < 44)
    .map(([what, box]) => `${what}: ${box.width} x ${box.height}`)"""


FAINT_TEXTS = """() => {
    const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
    const read = colour => {
        brush.clearRect(0, 0, 1, 1)
        brush.fillStyle = colour
        brush.fillRect(0, 0, 1, 1)
        return [...brush.getImageData(0, 0, 1, 1).data]
    }
    const behind = it => {
        const colour = read(getComputedStyle(it).backgroundColor)
        return colour[3] > 200 || !it.parentElement ? colour : behind(it.parentElement)
    }
    const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
        const share = colour[i] / 255
        return sum + weight * (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4)
    }, 0)
    const texts = [...document.querySelectorAll('body *')].filter(it => it.checkVisibility({visibilityProperty: true})
        && [...it.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    return texts.map(it => {
        const [a, b] = [light(read(getComputedStyle(it).color)), light(behind(it))].sort((x, y) => y - x)
        return [it.innerText, (a + 0.05) / (b + 0.05)]
    }).filter(([, contrast]) => contrast < 4.5)
}"""  # WCAG 2.2, 1.4.3
