"""Errors of the clients."""


class ClientError(Exception):
    """What came, what would fit, and what to do next, in one message."""


class RefusedError(ClientError):
    """What the server refused: `code` is one of a fixed set, `request_id` finds it in the server's log."""

    def __init__(self, message: str, code: str, status: int, request_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.request_id = request_id
