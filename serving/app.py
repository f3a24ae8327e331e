"""The routes of `tapir serve`: page, images API, pictures, health and metrics, all guarded."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from serving.config import ServeConfig
from serving.events import error_body
from serving.images_api import images_api
from serving.metrics import Metrics
from serving.ranks.group import JobError, RankGroup
from serving.security import Access, App, Guard, Message, Receive, Scope, Send
from serving.service import Service

PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/mask.js": ("mask.js", "text/javascript; charset=utf-8"),
    "/history.js": ("history.js", "text/javascript; charset=utf-8"),
}
_OPEN = {*_FILES, "/healthz"}
_PICTURES = "/pictures/"


def make_app(config: ServeConfig, groups: Mapping[str, RankGroup], token: str | None) -> App:
    """The guarded application; the ranks are started and stopped by the caller."""
    service = Service(groups, config.limits)
    app = FastAPI(title="Tapir", docs_url=None, redoc_url=None)
    app.include_router(images_api(service))
    _add_pages(app)
    _add_state(app, service)
    _add_errors(app)
    guard = Guard(
        app,
        access=Access(host=config.host, hosts=config.hosts, token=token),
        most_bytes=int(config.limits.upload_mb * 1e6),
        seconds=config.limits.upload_seconds,
        reading=config.limits.seconds,
        is_open=lambda path: path in _OPEN or path.startswith(_PICTURES),
    )
    return _Counted(guard, service.metrics)


def _add_pages(app: FastAPI) -> None:
    for path, (name, kind) in _FILES.items():
        app.add_route(path, _page(PAGE / name, kind), methods=["GET"], include_in_schema=False)


def _page(path: Path, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_request: Request) -> Response:
        return FileResponse(path, media_type=kind, headers={"cache-control": "no-cache"})

    return answer


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get(_PICTURES + "{name}.png")
    async def picture(name: str) -> Response:
        png = service.pictures.get(name)
        if png is None:
            raise JobError(404, "this picture is no longer kept; draw it again", "not_found")
        headers = {"cache-control": "private, max-age=31536000, immutable"}
        return Response(png, media_type="image/png", headers=headers)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        states = {name: group.state for name, group in service.groups.items()}
        ready = all(state == "ready" for state in states.values())
        return JSONResponse({"models": states}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(JobError)
    async def refused(_request: Request, error: JobError) -> JSONResponse:
        headers = {"retry-after": "2"} if error.status in (429, 503) else None
        return JSONResponse(error_body(error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(_request: Request, error: HTTPException) -> JSONResponse:
        code = "not_found" if error.status_code == 404 else "invalid_request"
        told = JobError(error.status_code, str(error.detail), code)
        return JSONResponse(error_body(told), error.status_code, error.headers)


class _Counted:
    """ASGI middleware: counts answers, refusals too, by the route's path as it is registered."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.count(route, message["status"])
            await send(message)

        await self._app(scope, receive, counting)
