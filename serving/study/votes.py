"""The votes of a study, in SQLite: a vote that was answered for survives kill -9 and power loss.

Of a rater there are a number and the digest of the link's token: no name, address or browser.
A caption that is shown to a rater is held for HOLD seconds, so that it gets `votes` valid votes and
not more. Votes of raters who fail catch trials are not valid: their captions are offered to others.
Every decision is one transaction, so that several servers may share the file.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError, TapirError
from core.files.atomic import sha256
from serving.study.study import DATABASE, QUESTIONS, Study

HOLD = 1800.0
"""Seconds for which a caption waits for the answer of a rater who sees it."""
_TOKEN_BYTES = 24
_BUSY_SECONDS = 30.0
_SCHEMA = """
CREATE TABLE study (digest TEXT NOT NULL);
CREATE TABLE rater (number INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE shown (
    rater INTEGER NOT NULL REFERENCES rater (number),
    trial INTEGER NOT NULL,
    since REAL NOT NULL,
    PRIMARY KEY (rater, trial)
) WITHOUT ROWID;
CREATE TABLE vote (
    rater INTEGER NOT NULL,
    trial INTEGER NOT NULL,
    question TEXT NOT NULL CHECK (question IN ('realism', 'match')),
    picked TEXT NOT NULL CHECK (picked IN ('a', 'b', 'neither')),
    seat TEXT NOT NULL CHECK (seat IN ('left', 'right', 'neither')),
    seconds REAL NOT NULL,
    PRIMARY KEY (rater, trial, question),
    FOREIGN KEY (rater, trial) REFERENCES shown (rater, trial)
) WITHOUT ROWID;
"""
_VOTED = "EXISTS (SELECT 1 FROM vote v WHERE v.rater = s.rater AND v.trial = s.trial)"
_VALID = "s.rater NOT IN (SELECT value FROM json_each(?))"
"""Of rows of `shown`; the value is `_failing` as JSON."""


class VoteError(TapirError):
    """A vote that does not count."""


class DoubleVoteError(VoteError):
    """The rater has answered for this trial before; the first answer counts."""


class NotShownError(VoteError):
    """The trial was not shown to the rater, or others have given all of its votes meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One answer."""

    rater: int
    trial: int
    question: str
    picked: str
    """a, b or neither."""
    seat: str
    """left, right or neither: what the rater clicked."""
    seconds: float
    """Since the trial was shown."""


def create_votes(folder: Path, study: Study) -> None:
    """Write the empty database of a new study."""
    with closing(sqlite3.connect(folder / DATABASE)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(_SCHEMA)
        database.execute("INSERT INTO study VALUES (?)", (study.digest,))
        database.commit()


class Votes:
    """Raters and votes of one study; threads may share it."""

    def __init__(self, folder: Path, study: Study) -> None:
        """Open the database.

        Raises: InputError if it is missing, or of another study.
        """
        path = folder / DATABASE
        if not path.is_file():
            raise InputError(f"there is no {path}: the study's votes; restore the file")
        self._study, self._lock = study, threading.Lock()
        self._database = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            for setting in ("synchronous = FULL", "foreign_keys = ON"):
                self._database.execute(f"PRAGMA {setting}")
            digests = self._database.execute("SELECT digest FROM study").fetchall()
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is not a study's database: {error}; restore it") from error
        if digests != [(study.digest,)]:
            raise InputError(f"{path} holds the votes of another study; restore it")

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def add_raters(self, count: int) -> list[tuple[int, str]]:
        """Add raters; returns the number and token of each. Tokens cannot be read again."""
        with self._transaction() as database:
            first = self._one("SELECT coalesce(max(number), 0) + 1 FROM rater")
            rows = [(first + i, _new_token()) for i in range(count)]
            hashed = [(number, _hashed(token)) for number, token in rows]
            database.executemany("INSERT INTO rater VALUES (?, ?)", hashed)
        return rows

    def replace_token(self, rater: int) -> str:
        """Give a rater a new token; the old one ends, and votes stay.

        Raises: InputError if there is no such rater.
        """
        token = _new_token()
        with self._transaction() as database:
            done = database.execute(
                "UPDATE rater SET token = ? WHERE number = ?", (_hashed(token), rater)
            )
            if not done.rowcount:
                raise InputError(f"there is no rater {rater}; see how many: tapir study results")
        return token

    def rater_of(self, token: str) -> int | None:
        """The number of the rater with this token."""
        with self._lock:
            rows = self._database.execute(
                "SELECT number FROM rater WHERE token = ?", (_hashed(token),)
            ).fetchall()
        return rows[0][0] if rows else None

    def raters(self) -> list[int]:
        """The numbers of all raters."""
        with self._lock:
            rows = self._database.execute("SELECT number FROM rater ORDER BY number").fetchall()
        return [number for (number,) in rows]

    def next_trial(self, rater: int) -> int | None:
        """The trial that a rater sees now: the open one again, else a new one; None at the end.

        A new caption is the first in the rater's order that others do not fill.
        """
        now = time.time()
        with self._transaction() as database:
            trial = self._open(rater)
            if trial is None:
                trial = self._new(rater, self._full(now))
            if trial is not None:
                database.execute(
                    "INSERT OR REPLACE INTO shown VALUES (?, ?, ?)", (rater, trial, now)
                )
        return trial

    def was_shown(self, rater: int, trial: int) -> bool:
        """True if the rater has seen, or sees, the trial."""
        with self._lock:
            return self._since(rater, trial) is not None

    def add(self, rater: int, trial: int, seats: Mapping[str, str]) -> None:
        """Store a rater's answers for a trial: question -> left, right or neither; all or none.

        They are on the disk when this returns.
        Raises: DoubleVoteError; NotShownError.
        """
        left, now = self._study.left(trial, rater), time.time()
        picked = {"left": left, "right": "b" if left == "a" else "a", "neither": "neither"}
        with self._transaction() as database:
            since = self._since(rater, trial)
            if since is None or self._is_filled(rater, trial):
                raise NotShownError("these pictures are not open for this rater")
            rows = [
                (rater, trial, question, picked[seats[question]], seats[question], now - since)
                for question in QUESTIONS
            ]
            try:
                database.executemany("INSERT INTO vote VALUES (?, ?, ?, ?, ?, ?)", rows)
            except sqlite3.IntegrityError as error:
                raise DoubleVoteError("this rater has answered before") from error

    def counts(self, rater: int) -> tuple[int, int]:
        """Captions and catch trials that a rater has answered."""
        with self._lock:
            return self._answered(rater)

    def all(self) -> list[Vote]:
        """All votes, by rater, trial and question."""
        with self._lock:
            rows = self._database.execute(
                "SELECT rater, trial, question, picked, seat, seconds FROM vote ORDER BY 1, 2, 3"
            ).fetchall()
        names = ("rater", "trial", "question", "picked", "seat", "seconds")
        return [Vote(**dict(zip(names, row, strict=True))) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time, here and in other processes; all or nothing."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                if self._database.in_transaction:  # SQLite itself ends some, e.g. on a full disk
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _one(self, query: str, *values: object) -> int:
        return int(self._database.execute(query, values).fetchone()[0])

    def _since(self, rater: int, trial: int) -> float | None:
        row = self._database.execute(
            "SELECT since FROM shown WHERE rater = ? AND trial = ?", (rater, trial)
        ).fetchone()
        return None if row is None else row[0]

    def _answered(self, rater: int) -> tuple[int, int]:
        count = len(self._study.captions)
        query = "SELECT count(DISTINCT trial) FROM vote WHERE rater = ? AND trial "
        return (self._one(f"{query} < ?", rater, count), self._one(f"{query} >= ?", rater, count))

    def _failing(self) -> str:
        """Raters whose votes do not count, judged by the catch trials that they have answered."""
        rows = self._database.execute(
            "SELECT rater, sum(picked = 'a'), count(*) FROM vote WHERE trial >= ? GROUP BY rater",
            (len(self._study.captions),),
        )
        return json.dumps(
            [rater for rater, right, asked in rows if not self._study.is_valid(right, asked)]
        )

    def _full(self, now: float) -> set[int]:
        """Captions whose valid votes are given, or held by raters who see them."""
        rows = self._database.execute(
            f"SELECT trial FROM shown s WHERE trial < ? AND (since > ? OR {_VOTED}) AND {_VALID} "
            "GROUP BY trial HAVING count(*) >= ?",
            (len(self._study.captions), now - HOLD, self._failing(), self._study.votes),
        )
        return {trial for (trial,) in rows}

    def _open(self, rater: int) -> int | None:
        """The trial that the rater sees and has not answered; forgets it if others filled it."""
        rows = self._database.execute(
            f"SELECT trial FROM shown s WHERE rater = ? AND NOT {_VOTED}", (rater,)
        ).fetchall()
        for (trial,) in rows:
            if not self._is_filled(rater, trial):
                return int(trial)
            self._database.execute(
                "DELETE FROM shown WHERE rater = ? AND trial = ?", (rater, trial)
            )
        return None

    def _is_filled(self, rater: int, trial: int) -> bool:
        """True if other raters have given all valid votes of a caption."""
        if self._study.is_catch(trial):
            return False
        others = self._one(
            "SELECT count(*) FROM shown s WHERE trial = ? AND rater <> ? "
            f"AND {_VOTED} AND {_VALID}",
            *(trial, rater, self._failing()),
        )
        return others >= self._study.votes

    def _new(self, rater: int, full: set[int]) -> int | None:
        study, (captions, catches) = self._study, self._answered(rater)
        rows = self._database.execute("SELECT trial FROM shown WHERE rater = ?", (rater,))
        taken = full | {trial for (trial,) in rows}
        left = [trial for trial in study.order(rater) if trial not in taken]
        if not left or captions >= study.limit():
            return None
        catch = study.due_catch(rater, captions, catches, len(left))
        return left[0] if catch is None else catch


def _new_token() -> str:
    return secrets.token_urlsafe(_TOKEN_BYTES)


def _hashed(token: str) -> str:
    return sha256(token.encode("utf-8", "surrogatepass"))
