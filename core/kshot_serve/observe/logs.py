"""Logs: JSON lines for machines, plain lines at a terminal; one line for each request."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from kshot_serve.observe.trace import current

_FLUSH_S = 0.1
_PIPE_BYTES = 4096


class JsonLines(JsonFormatter):
    """A log record as one JSON object: time, level, message, the request's ids, and the record's own `fields`."""

    def __init__(self) -> None:
        super().__init__(["message"], timestamp="time", rename_fields={"exc_info": "exception"})

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        log_data |= {"level": record.levelname.lower(), "logger": record.name} | _ids()
        log_data |= log_data.pop("fields", {})


def _ids() -> dict[str, str]:
    request = current.get()
    return {} if request is None else {"request_id": request.id, "trace_id": request.trace}


class Lines(logging.Formatter):
    """The same for a person at a terminal: one line, and the fields behind the message."""

    def format(self, record: logging.LogRecord) -> str:
        known = getattr(record, "fields", {}) | _ids()
        fields = " ".join(f"{name}={value}" for name, value in known.items())
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {record.getMessage()} {fields}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line.rstrip()


class _Buffered(logging.Handler):
    """Writes lines a few times a second, and a warning at once: a write for each would hold up every request.

    A write is of whole lines, of no more bytes than a pipe takes at once: those of several workers do not mix.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._file = open(os.dup(stream.fileno()), "wb", buffering=0)  # noqa: SIM115
        self._lines: list[bytes] = []
        self._wrote = threading.Event()
        threading.Thread(target=self._flushing, name="kshot-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(f"{self.format(record)}\n".encode())
            if record.levelno >= logging.WARNING:
                self.flush()
        except Exception:  # a log that nobody takes any more fails no request
            self.handleError(record)
        self._wrote.set()

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            for block in _blocks(lines):
                while block:
                    block = block[self._file.write(block) :]
        finally:
            self.release()

    def _flushing(self) -> None:
        while self._wrote.wait():
            time.sleep(_FLUSH_S)
            self._wrote.clear()
            with suppress(OSError):
                self.flush()


def _blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines together, as many as a pipe takes without parting them (PIPE_BUF); a longer line by itself."""
    block = b""
    for line in lines:
        if block and len(block) + len(line) > _PIPE_BYTES:
            yield block
            block = b""
        block += line
    if block:
        yield block


def configure_logs(stream: TextIO) -> None:
    """All logs of this process on one stream: lines for a person if one looks on, else JSON."""
    handler = logging.StreamHandler(stream) if stream.isatty() else _Buffered(stream)
    handler.setFormatter(Lines() if stream.isatty() else JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)  # Pillow has some for damaged photos, and every line is to be JSON
    for noisy in ("uvicorn", "uvicorn.error", "python_multipart", "alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
