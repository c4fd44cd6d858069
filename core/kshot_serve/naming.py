"""What a name is, whichever way it was typed: server and client compare the same."""

from __future__ import annotations

import unicodedata


def normal(name: str) -> str:
    """The name in its normal form, without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()
