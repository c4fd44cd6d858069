"""What one caller may hold at once and ask for in a second, so that no caller can take it all from the others.

A caller is a key, by its id, or, where no key was sent, a client's address.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from ipaddress import ip_address, ip_network
from time import monotonic
from typing import Any, Literal

from kshot_serve.errors import Problem
from kshot_serve.settings import Settings

Reason = Literal["bodies", "answers", "requests", "queue", "rate", "wait"]
"""What a caller has too much of; "wait": its images would wait for too long."""

SPARE_FILES = 128
"""Open files that are no connections: models, databases, logs; and, of half of them, connections that are refused."""
_EXPORTS = 4  # at once; each is a file of a whole label space until it has been sent
_CALLERS = 10_000  # whose rates are remembered
_PATIENCE = 10  # refusals of one caller in a second, before it is refused everything
_REFUSED_S = 1.0  # at most, that everything of a caller is refused then
_NEVER = (0.0, 0, 0.0)
_BURST_S = 10.0  # a caller that was silent for so long may send that many seconds' worth at once


current_caller: ContextVar[str] = ContextVar("caller", default="")
"""Who the work of this task is for; empty for the server's own."""


class Share:
    """An amount that all callers hold parts of; one caller may hold `share` of it while the others hold nothing.

    A caller may hold at most share / (1 - share) times what is left free. With a share of half, one caller gets a
    half, two get a third each, and so on: whoever comes next finds some (dynamic thresholds, Choudhury and Hahne 1998).
    """

    def __init__(self, total: int, share: float, reason: Reason, message: str) -> None:
        self.total = total
        self.held: Counter[str] = Counter()
        self._share = share
        self._reason = reason
        self._message = message
        self.taken = 0

    def fits(self, caller: str, amount: int, *, all_of_it: bool = False) -> bool:
        """Whether a caller may take so much more; with `all_of_it`, of everything that is free."""
        free = self.total - self.taken - amount
        within = (1 - self._share) * (self.held[caller] + amount) <= self._share * free
        return free >= 0 and (within or all_of_it)

    def take(self, caller: str, amount: int, *, all_of_it: bool = False) -> None:
        """Take an amount until it is given back, or raise Problem `busy` (429)."""
        if not self.fits(caller, amount, all_of_it=all_of_it):
            raise Problem("busy", self._message, retry_after=1, reason=self._reason)
        self.held[caller] += amount
        self.taken += amount

    def give(self, caller: str, amount: int) -> None:
        self.taken -= amount
        self.held[caller] -= amount
        if not self.held[caller]:
            del self.held[caller]

    @contextmanager
    def holding(self, caller: str, amount: int = 1) -> Iterator[None]:
        """Hold an amount during a block, or raise Problem `busy` (429)."""
        self.take(caller, amount)
        try:
            yield
        finally:
            self.give(caller, amount)


class Rate:
    """So many events a second from each caller, and ten seconds' worth at once after a pause; 0: any number.

    A token bucket, kept as one time for each caller: when its bucket will be full again (GCRA).
    """

    def __init__(self, per_second: float, message: str, clock: Callable[[], float] = monotonic) -> None:
        self._interval = 1 / per_second if per_second else 0.0
        self._message = message
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def take(self, caller: str) -> None:
        """Count an event, or raise Problem `busy` (429) that says when the next one may come."""
        if not self._interval:
            return
        now = self._clock()
        full_at = max(now, self._full_at.pop(caller, now)) + self._interval
        if (wait := full_at - now - max(_BURST_S, self._interval)) > 0:
            self._full_at[caller] = full_at - self._interval
            raise Problem("busy", self._message, retry_after=wait, reason="rate")
        self._full_at[caller] = full_at  # at the end of the dict, so that the first has been silent for longest
        if len(self._full_at) > _CALLERS:
            del self._full_at[next(iter(self._full_at))]

    def give(self, caller: str) -> None:
        """Forget one counted event."""
        if caller in self._full_at:
            self._full_at[caller] -= self._interval


class Budgets:
    """The shares and rates of a server; each `Share` and `Rate` is for all callers."""

    def __init__(self, settings: Settings) -> None:
        share, megabyte = settings.share, 1_000_000
        # By credential: when a second began, refusals in it, and until when everything is refused.
        self._refusals: dict[str, tuple[float, int, float]] = {}
        self._refused_until = 0.0  # the last of them
        self.bodies = Share(
            settings.bodies_mb * megabyte, share, "bodies", "too many large requests at once: try again"
        )
        self.answers = Share(
            settings.answers_mb * megabyte,
            share,
            "answers",
            "too many large answers at once: try again",
        )
        self.exports = Share(_EXPORTS, share, "answers", "too many exports at once: try again")
        self.connections = _connections(settings.connections)
        self.requests = Share(settings.requests, share, "requests", "too many requests at once: try again")
        self.request_rate = Rate(settings.requests_per_s, "more requests than this server takes from one caller")
        self.wrong_key_rate = Rate(settings.wrong_keys_per_s, "too many wrong keys came from this address")

    def refused(self, credential: str, wait: float) -> None:
        """Count a refusal. Who is refused often, and does not wait as it was told, is refused everything for a moment.

        That is half of the estimated wait, so that a queue that was full has work until then.
        """
        now = monotonic()
        since, count, until = self._refusals.pop(credential, (now, 0, 0.0))
        since, count = (since, count + 1) if now < since + 1 else (now, 1)
        if count > _PATIENCE:
            until = now + min(wait / 2, _REFUSED_S)
            self._refused_until = max(self._refused_until, until)
        self._refusals[credential] = since, count, until
        if len(self._refusals) > _CALLERS:
            del self._refusals[next(iter(self._refusals))]

    def refuses(self, credential: Callable[[], str]) -> bool:
        """Whether this credential is refused everything now; it is only asked for where any is."""
        now = monotonic()
        return now < self._refused_until and now < self._refusals.get(credential(), _NEVER)[2]


def _connections(wanted: int) -> int:
    """How many connections there may be: as many as wanted, or as the system's limit of open files allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(16, min(wanted, files - SPARE_FILES))


def caller_of(scope: Any) -> str:
    """Who sent the request of this ASGI scope: the id of its key, once that is known, or its client's address."""
    key = scope.get("state", {}).get("key")
    return key.id if key is not None else address_of(scope)


def address_of(scope: Any) -> str:
    """The address of the client of this ASGI scope; of IPv6 the network of 64 bits, all of which is one client's."""
    return _network(scope["client"][0]) if scope.get("client") else ""


@lru_cache(1024)
def _network(address: str) -> str:
    try:
        return str(ip_network((address, 64), strict=False)) if ip_address(address).version == 6 else address
    except ValueError:
        return address
