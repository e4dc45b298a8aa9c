"""Runs the application on a socket, and ends it gently: refuse, finish, leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from polyphase.core.errors import ConfigurationError, Draining, InvalidRequest
from polyphase.frontend.answers import encode
from polyphase.frontend.endpoints import Services
from polyphase.frontend.problems import error_object

log = logging.getLogger(__name__)

BACKLOG = 2048
GOODBYE_S = 2.0  # for the last bytes of answers that are over
KEEP_ALIVE_S = 75
SAME_WISH_S = 1.0


class FrontendProtocol(HttpToolsProtocol):
    """Switches Nagle's algorithm off: with delayed acknowledgements it holds short answers back for 40 ms. Errors are OpenAI's, always."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)

    def send_400_response(self, msg: str) -> None:
        """To what is not HTTP, or breaks its rules; the application never sees it."""
        body = encode(error_object(InvalidRequest(msg)))
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are ours


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ConfigurationError if the address is not to be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port with --port") from error
    listener.setblocking(False)
    return listener


class HttpServer:
    """The application on a socket until told to stop. Owner of the socket: this."""

    def __init__(self, app: ASGIApp, services: Services, listener: socket.socket) -> None:
        self._services = services
        self._listener = listener
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                app,
                http=FrontendProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(GOODBYE_S)),
            )
        )

    def stop(self) -> None:
        """Refuse new requests with 503, finish those that run, then end `run`. Idempotent."""
        self._stop.set()

    def stop_now(self) -> None:
        """Break off what still runs, with an error to its client, and end `run`."""
        self._hurry.set()
        self._stop.set()

    def install_signal_handlers(self) -> None:
        """The first SIGTERM or SIGINT drains, a later one ends at once.

        What follows the first within a second is the same wish, sent twice: by the supervisor, and by whoever signalled all processes.
        """
        first_s: float | None = None

        def on_signal() -> None:
            nonlocal first_s
            if first_s is None:
                first_s = time.monotonic()
                self.stop()
            elif time.monotonic() - first_s >= SAME_WISH_S:
                self.stop_now()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)

    async def run(self) -> None:
        """Serve until `stop`, and until what ran then is finished or the drain timeout is over."""
        host, port = self._listener.getsockname()[:2]
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        log.info("listening on %s port %s", host, port)
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._server.serve(sockets=[self._listener]), name="http-server")
            drainer = tasks.create_task(self._drain(), name="drain")
            await serving
            drainer.cancel()

    async def _drain(self) -> None:
        await self._stop.wait()
        door, dispatcher = self._services.door, self._services.dispatcher
        timeout_s = self._services.settings.drain_timeout_s
        door.close()
        log.info("draining: %d requests are open", door.inside_count)
        waiting = [asyncio.create_task(door.wait_until_empty()), asyncio.create_task(self._hurry.wait())]
        try:
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if door.inside_count:
            log.warning("%d requests were not finished in time and are broken off", door.inside_count)
        dispatcher.fail_all(Draining("this frontend had to end before the answer was complete; send the request again"))
        self._server.should_exit = True
