"""The outermost layer of the application: gives every request its id, and turns whatever is raised into OpenAI's error object."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyphase.core.errors import MethodNotAllowed, PolyphaseError, Refused, RequestError, RouteNotFound
from polyphase.frontend.bodies import ClientGone, header
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.names import RequestNames
from polyphase.frontend.problems import InternalError, error_response
from polyphase.observe.logs import request_context

log = logging.getLogger(__name__)


class Boundary:
    """The root of each request's task: nothing is raised beyond it, and every answer carries `x-request-id`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        names = RequestNames.of(header(scope, b"x-request-id"))
        scope.setdefault("state", {})["names"] = names
        scope["app"] = self  # so that Starlette's router raises what it does not find, instead of answering by itself
        id_header = (b"x-request-id", names.shown.encode())
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", []), id_header]
            await send(message)

        with request_context(names.shown):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientGone:
                return
            except Exception as error:  # the root of this request's task
                if has_started:  # the connection is closed on an answer that is not whole
                    log.exception("internal error after the answer had begun")
                    return
                response = error_response(*self._explain(error, scope, names))
                await response(scope, receive, send_with_id)

    def _explain(self, error: Exception, scope: Scope, names: RequestNames) -> tuple[PolyphaseError, dict[str, str]]:
        """The error to answer with, and headers of its own."""
        match error:
            case HTTPException(status_code=404):
                where = f"{scope['method']} {scope['path'][:200]}"
                return RouteNotFound(f"there is nothing at {where}; text is generated at POST /v1/chat/completions and /v1/completions"), {}
            case HTTPException(status_code=405):
                allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").replace(" ", "").split(",")))
                return MethodNotAllowed(f"{scope['method']} is not allowed at {scope['path'][:200]}; use {allowed}"), {"allow": allowed}
            case PolyphaseError():
                if isinstance(error, RequestError | Refused):
                    self._metrics.count_rejection(error.code)
                else:
                    log.warning("%s: %s", error.code, error.message)
                return error, {}
            case _:
                log.exception("internal error", exc_info=error)
                return InternalError(names.shown), {}
