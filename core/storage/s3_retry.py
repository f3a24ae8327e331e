"""Retries of requests to an object store: when, for how long, and with which client."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import boto3
from botocore.exceptions import BotoCoreError, ClientError, ConnectionClosedError

from core.errors import StoreError
from core.keys import key_fraction
from core.log import LOG
from core.storage.s3_answers import CUT, is_conflict, is_page, may_be_checksums, passes
from core.storage.s3_clients import clients_of
from core.storage.s3_messages import EXPLAINED, explanation, unreadable, wrong_settings

PATIENCE, FIRST_PATIENCE = 300.0, 30.0
"""Seconds of outage to wait out, and the same before the store's first answer."""
T = TypeVar("T")
_CONFLICTS = 12
"""Retries of a write that conflicts with other writers; half a minute at most."""


class Retries:
    """Sends requests to one store; its state is what the answers revealed about the store."""

    def __init__(self, url: str, attempts: int, patience: float) -> None:
        """`attempts` are botocore's own, within one request."""
        self._url, self._patience = url, patience
        self._answered = self._plain = False
        try:
            session = boto3.session.Session()
            self._make = functools.partial(clients_of, session, attempts)
            self._first, self.later = self._make(plain=False)
        except (ValueError, BotoCoreError) as error:
            raise wrong_settings(url, error) from error

    @property
    def client(self) -> Any:
        """The client of the next request; before the first answer its timeout is shorter."""
        return self.later if self._answered else self._first

    @contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Raise errors of a request as StoreError."""
        try:
            yield
        except EXPLAINED as error:
            raise explanation(error, self._url, name, self._answered) from error

    def ask(self, name: str, request: Callable[[Any], T]) -> T:
        """Run a request with a client; waits out outages of a store that has answered."""
        began, attempt, conflicts = time.monotonic(), 0, 0
        while True:
            try:
                with self.explained(name):
                    result = request(self.client)
                self._answered = True
                return result
            except (KeyError, TypeError, ValueError) as error:  # of boto3's parsers
                raise unreadable(self._url, name, error) from error
            except StoreError as error:
                cause = error.__cause__
                if not self._plain and may_be_checksums(cause):
                    return self._ask_plainly(name, request, error)
                if is_conflict(cause) and conflicts < _CONFLICTS:
                    pause = min(0.05 * 2.0**conflicts, 3.0)
                    conflicts += 1
                else:
                    self._refuse_or_wait(error, began)
                    pause = min(0.2 * 2.0**attempt, 10.0)
                    attempt += 1
                pause *= 0.5 + key_fraction(name, attempt + conflicts, "jitter")
                LOG.warning("%s; again in %.1f s", error, pause)
                time.sleep(pause)

    def _refuse_or_wait(self, error: StoreError, began: float) -> None:
        """Raise the error, unless it is transient and there is time left."""
        cause = error.__cause__
        may_pass = isinstance(cause, CUT) or passes(cause)
        self._answered |= isinstance(cause, ClientError) and not may_pass  # "no" is an answer
        if not may_pass or time.monotonic() - began > self._waits(cause):
            raise error

    def _ask_plainly(self, name: str, request: Callable[[Any], T], error: StoreError) -> T:
        """Repeat a refused request without checksums; keep that for later ones on success."""
        clients, self._plain = (self._first, self.later), True
        self._first, self.later = self._make(plain=True)
        try:
            result = self.ask(name, request)
        except StoreError as again:
            if may_be_checksums(again.__cause__):
                (self._first, self.later), self._plain = clients, False
                raise error from error.__cause__
            raise
        LOG.warning("%s takes no checksums of requests (%s): they are left out", self._url, error)
        return result

    def _waits(self, cause: BaseException | None) -> float:
        """Seconds for which a transient error is waited out."""
        if self._answered and not is_page(cause):
            return self._patience
        listens = isinstance(cause, (ClientError, ConnectionClosedError, *CUT))
        return min(self._patience, FIRST_PATIENCE) if listens else -1.0
