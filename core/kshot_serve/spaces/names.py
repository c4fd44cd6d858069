"""Names of label spaces and classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import count

from kshot_serve.errors import Problem


def normal(name: str) -> str:
    """The name in its normal form, without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


_NAME_LENGTH = 200
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, marks that turn text around, halves of letters, line ends
_JOINERS = "\u200c\u200d"  # of letters in some scripts, and of emoji


def named(name: str, what: str) -> str:
    """The name in its normal form, if it can name something."""
    name = normal(name)
    if not 1 <= len(name) <= _NAME_LENGTH:
        raise Problem("bad_request", f"{what} needs a name of 1 to {_NAME_LENGTH} characters", reason="name")
    if any(unicodedata.category(letter) in _INVISIBLE and letter not in _JOINERS for letter in name):
        raise Problem("bad_request", f"{what} needs a name without control characters", reason="name")
    return name


def numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        end = f" ({number})"
        yield name[: _NAME_LENGTH - len(end)] + end
