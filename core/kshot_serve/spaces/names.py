"""Names of label spaces and classes: which are taken, and which look alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from itertools import count

from kshot_serve.errors import Problem


def normal(name: str) -> str:
    """The name in its normal form, without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


_NAME_LENGTH = 200
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, marks that turn text around, halves of letters, line ends
_JOINERS = "\u200c\u200d"  # of letters in some scripts, and of emoji
_BLANK = "\u115f\u1160\u3164\uffa0\u2800"  # letters and symbols that show nothing: Hangul fillers, empty Braille
_TWINS = str.maketrans(  # Cyrillic and Greek letters, after casefold, that look like Latin ones in upper or lower case
    "авеікмнорстухѕјһԁԛԝ" + "αβεζηικμνορτυχ", "abeikmhopctyxsjhdqw" + "abezhikmnoptyx"
)


def named(name: str, what: str) -> str:
    """The name in its normal form, if it can name something."""
    name = normal(name)
    if not 1 <= len(name) <= _NAME_LENGTH:
        raise Problem("bad_request", f"{what} needs a name of 1 to {_NAME_LENGTH} characters", reason="name")
    if any(unicodedata.category(letter) in _INVISIBLE and letter not in _JOINERS for letter in name):
        raise Problem("bad_request", f"{what} needs a name without control characters", reason="name")
    if not any(unicodedata.category(letter)[0] in "LNPS" and letter not in _BLANK for letter in name):
        raise Problem("bad_request", f"{what} needs a name with a visible character", reason="name")
    return name


def looks(name: str) -> str:
    """What a reader sees of a name: equal for names that differ in case, width, blanks or script only."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).translate(_TWINS)
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] in "LNPSM" and letter not in _BLANK)


def alike(name: str, others: Iterable[str]) -> list[str]:
    """Notes for people: the other names that this one could be taken for."""
    seen = looks(name)
    return [
        f"the name looks like that of class {other!r}" for other in others if other != name and looks(other) == seen
    ]


def numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        end = f" ({number})"
        yield name[: _NAME_LENGTH - len(end)] + end
