"""The errors that are a user's to mend: a command prints their message and no traceback."""


class KshotError(Exception):
    """What came, what would fit, and what to do next, in one message."""
