"""Which endpoint answers at which path."""

from __future__ import annotations

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from polyphase.frontend.boundary import Boundary
from polyphase.frontend.chat_format import ChatFormat
from polyphase.frontend.completion_format import CompletionFormat
from polyphase.frontend.endpoints import GenerationEndpoint, Services, Surface
from polyphase.frontend.openai_types import ChatRequest, CompletionRequest
from polyphase.frontend.pages import Pages
from polyphase.frontend.pass_through import PATHS, PassedEndpoint, PassThrough
from polyphase.frontend.prompts import chat_prompts, completion_prompts
from polyphase.frontend.validation import chat_wishes, completion_wishes
from polyphase.router import Router as WorkerRouter
from polyphase.wire.cards import RequestKind

CHAT = Surface("chat.completions", RequestKind.CHAT, "chatcmpl", ChatRequest, chat_wishes, chat_prompts, ChatFormat)
COMPLETIONS = Surface(
    "completions", RequestKind.COMPLETIONS, "cmpl", CompletionRequest, completion_wishes, completion_prompts, CompletionFormat
)


def build_app(services: Services, worker_router: WorkerRouter) -> ASGIApp:
    """The whole HTTP surface of one frontend."""
    passing = PassThrough(services, worker_router.facts)
    pages = Pages(services, worker_router)
    services.metrics.watch_workers(worker_router.workers)
    services.metrics.watch_index(worker_router.index_fill, services.streams)
    routes = Router(
        [
            Route("/v1/chat/completions", GenerationEndpoint(CHAT, services, passing), methods=["POST"]),
            Route("/v1/completions", GenerationEndpoint(COMPLETIONS, services, passing), methods=["POST"]),
            *(Route(path, PassedEndpoint(kind, passing, services), methods=["POST"]) for path, kind in PATHS.items()),
            Route("/v1/models", pages.models),
            Route("/v1/models/{name:path}", pages.model),
            Route("/health", pages.health),
            Route("/live", pages.live),
            Route("/metrics", pages.metrics),
            Route("/debug/requests", pages.records),
            Route("/debug/requests/{name}", pages.record),
        ],
        redirect_slashes=False,
    )
    return Boundary(routes, services.metrics)
