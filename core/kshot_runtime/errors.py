"""Errors that a user can fix: commands print their message without a traceback."""


class KshotError(Exception):
    """What came, what would fit, and what to do next, in one message."""
