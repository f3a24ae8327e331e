"""The raters' pages: `/r/TOKEN` shows the next pair, a POST answers, and no page names a set.

The token in the link is the access. It is in no log: the server keeps no access log, and the pages
send their address to nobody else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Form, HTTPException
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from serving.security import Access, App, Guard
from serving.study.report import PAGES, templates
from serving.study.study import Study, picture_file
from serving.study.votes import DoubleVoteError, NotShownError, Votes

Seat = Literal["left", "right"]
Trial = Annotated[int, InPath(ge=0, lt=2**31)]
MOST_BYTES, SECONDS = 4096, 30.0
"""Size of an answer, and time in which it must arrive."""
_SEATS = [{"value": "left", "text": "Left"}, {"value": "right", "text": "Right"}]
QUESTIONS: dict[str, dict[str, Any]] = {
    "realism": {"text": "Which picture is more realistic?", "answers": _SEATS},
    "match": {
        "text": "Which picture matches the caption better?",
        "answers": [*_SEATS, {"value": "neither", "text": "Neither"}],
    },
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # with no-referrer, a form's Origin would be "null"
}
_FILES = {"study.css": "text/css", "vote.js": "text/javascript"}
_DONE = "Thank you: there is nothing more to compare by this link."
_DOUBLE = "You have answered for these pictures before; the first answer counts."
_CLOSED = "These pictures have all their answers meanwhile, or are not open by this link."
_UNKNOWN = "This link is not valid. Ask the person who sent it for a new one."


def study_app(folder: Path, study: Study, votes: Votes, access: Access) -> App:
    """The server of one study."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for name, kind in _FILES.items():
        app.get(f"/{name}")(_file(name, kind))
    app.get("/healthz")(lambda: {"status": "ok"})
    pages = _Pages(folder, study, votes)
    app.get("/r/{token}")(pages.next)
    app.get("/r/{token}/{trial}/{seat}.png")(pages.picture)
    app.post("/r/{token}/{trial}")(pages.answer)
    return Guard(
        app, access=access, most_bytes=MOST_BYTES, seconds=SECONDS, is_open=lambda path: True
    )


class _Pages:
    """The routes of raters."""

    def __init__(self, folder: Path, study: Study, votes: Votes) -> None:
        self._folder, self._study, self._votes = folder, study, votes
        self._template = templates().get_template("rater.html")

    def next(self, token: str) -> Response:
        """The pictures that the rater sees now."""
        rater = self._votes.rater_of(token)
        if rater is None:
            return self._message(404, "Unknown link", _UNKNOWN)
        trial = self._votes.next_trial(rater)
        captions, catches = self._votes.counts(rater)
        if trial is None:
            return self._message(200, "All done", _DONE)
        study = self._study
        total = study.limit() + study.catches_of(study.limit())
        progress = f"Pictures {captions + catches + 1} of {total}"
        return self._page(
            200,
            title=progress,
            trial=trial,
            progress=progress,
            caption=study.caption(trial),
            link=f"/r/{token}",
            questions=[{"name": name, **QUESTIONS[name]} for name in QUESTIONS],
        )

    def picture(self, token: str, trial: Trial, seat: Seat) -> Response:
        """One of the two pictures, if they were shown to this rater."""
        rater = self._votes.rater_of(token)
        if rater is None or not self._votes.was_shown(rater, trial):
            raise HTTPException(404)
        left = self._study.left(trial, rater)
        right: Literal["a", "b"] = "b" if left == "a" else "a"
        path = picture_file(self._folder, trial, left if seat == "left" else right)
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(path.read_bytes(), media_type="image/png", headers=headers)

    def answer(
        self,
        token: str,
        trial: Trial,
        realism: Annotated[str, Form()] = "",
        match: Annotated[str, Form()] = "",
    ) -> Response:
        """Store an answer, and go on."""
        rater, link = self._votes.rater_of(token), f"/r/{token}"
        if rater is None:
            return self._message(404, "Unknown link", _UNKNOWN)
        seats = {"realism": realism, "match": match}
        known = {q: {row["value"] for row in QUESTIONS[q]["answers"]} for q in QUESTIONS}
        if any(seats[question] not in known[question] for question in known):
            return self._message(422, "Answer missing", "Please answer both questions.", link)
        try:
            self._votes.add(rater, trial, seats)
        except DoubleVoteError:
            return self._message(409, "Answered before", _DOUBLE, link)
        except NotShownError:
            return self._message(409, "Not open", _CLOSED, link)
        return RedirectResponse(link, 303, _HEADERS)

    def _message(self, status: int, title: str, message: str, link: str = "") -> HTMLResponse:
        return self._page(
            status, title=title, trial=None, message=message, link=link, link_text="Go on"
        )

    def _page(self, status: int, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._template.render(**values), status, _HEADERS)


def _file(name: str, kind: str) -> Callable[[], Response]:
    content = (PAGES / name).read_bytes()
    return lambda: Response(content, media_type=kind)
