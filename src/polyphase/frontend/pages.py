"""The endpoints that only tell something: models, health, liveness, metrics, records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from polyphase.core.errors import ModelNotFound, RouteNotFound
from polyphase.frontend.answers import encode
from polyphase.frontend.endpoints import Services
from polyphase.frontend.metrics import CONTENT_TYPE
from polyphase.frontend.models import Addressed
from polyphase.frontend.waiting_room import LaneView
from polyphase.router import Drift, Router, WorkerView, can_serve, group_weights, misfits, shortcomings
from polyphase.runtime import StreamView

LATEST_COUNT = 50


class Pages:
    def __init__(self, services: Services, router: Router) -> None:
        self._services = services
        self._router = router

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_model(addressed) for addressed in self._services.models]})

    async def model(self, request: Request) -> Response:
        wanted = request.path_params["name"]
        for addressed in self._services.models:
            if addressed.name == wanted:
                return _json(_model(addressed))
        served = ", ".join(self._services.models.names()) or "none at the moment"
        raise ModelNotFound(f"the model {wanted[:100]!r} does not exist; served are: {served}", param="model")

    async def health(self, request: Request) -> Response:
        """200 if a request would find a worker; 503 with the same page if not."""
        models: dict[str, dict[str, Any]] = {}
        streams = self._services.streams()
        views = self._router.workers()
        for view in views:
            workers = models.setdefault(view.facts.model, {"workers": {}})["workers"]
            drift = self._services.dispatcher.predictions.drifts.get(view.facts.worker_id)
            workers[view.facts.worker_id] = {**_worker(view), "drift": _drift(drift), "stream": _stream(streams.get(view.facts.worker_id))}
        serves = False
        for name, model in models.items():
            takers = [view.facts for view in views if view.facts.model == name and _takes_requests(view)]
            model["is_ready"] = can_serve(takers)
            serves = serves or model["is_ready"]
            model["names"] = [one.name for one in self._services.models if one.model.name == name]
            model["weights"] = group_weights(view.facts for view in views if view.facts.model == name)
            model["notes"] = shortcomings(facts.role for facts in takers)
            model["misfits"] = misfits(view.facts for view in views if view.facts.model == name)
        for lane in self._services.dispatcher.waiting_room.lanes(self._services.dispatcher.now_ns()):
            models.setdefault(lane.model, {"workers": {}}).setdefault("queues", []).append(_lane(lane))
        is_draining = self._services.door.is_closed
        status = "draining" if is_draining else "healthy" if serves else "unhealthy"
        page = {
            "status": status,
            "active_requests": self._services.dispatcher.active_count,
            "models": models,
            "turned_away": self._services.turned_away(),
            "index": asdict(self._router.index_fill()),
        }
        return _json(page, 200 if serves and not is_draining else 503)

    async def live(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._services.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def records(self, request: Request) -> Response:
        """The latest 50; with `?limit=N`, fewer."""
        wanted = request.query_params.get("limit", "")
        count = min(int(wanted), LATEST_COUNT) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 6 else LATEST_COUNT
        return _json({"data": [record.as_json() for record in self._services.records.latest(count)]})

    async def record(self, request: Request) -> Response:
        wanted = request.path_params["name"]
        record = self._services.records.find(wanted)
        if record is None:
            limit = self._services.settings.record_count
            raise RouteNotFound(f"there is no record of request {wanted[:100]!r}; only the latest {limit:,} are kept")
        return _json(record.details())


def _model(addressed: Addressed) -> dict[str, Any]:
    """Source: vLLM's list, where an alias has the model as its root, and an adapter has it as its parent."""
    card = addressed.model.card
    return {
        "id": addressed.name,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": "polyphase",
        "root": addressed.true_name,
        "parent": card.name if addressed.adapter else None,
        "max_model_len": card.context_length or None,
    }


def _worker(view: WorkerView) -> dict[str, Any]:
    facts, load = view.facts, view.load
    page: dict[str, Any] = {
        "role": facts.role.value,
        "engine": facts.engine,
        "group": facts.group,
        "weight": facts.weight,
        "adapters": sorted(facts.adapters),
        "block_size": facts.block_size,
        "epoch": facts.epoch,
        "is_draining": facts.is_draining,
        "is_stalled": facts.is_stalled,
        "is_asleep": facts.is_asleep,
        "running": load.running_count if load else 0,
        "waiting": load.waiting_count if load else 0,
        "block_count": facts.block_count,
        "used_block_count": load.used_block_count if load else 0,
        "booked_requests": view.booked_request_count,
        "booked_prefill_tokens": view.booked_prefill_tokens,
        "booked_blocks": view.booked_block_count,
    }
    if load is not None:
        shown = {"running_count", "waiting_count", "block_count", "used_block_count"}
        page.update({name: getattr(load, name) for name in load.__struct_fields__ if name not in shown})
    return page


def _takes_requests(view: WorkerView) -> bool:
    return view.facts.is_available


def _lane(lane: LaneView) -> dict[str, Any]:
    return {
        "waits_for_prefill_worker": lane.waits_for_prefill,
        "requests": lane.requests,
        "prompt_tokens": lane.tokens,
        "oldest_wait_s": round(lane.oldest_wait_s, 3),
        "drain_time_s": None if lane.drain_time_s is None else round(lane.drain_time_s, 3),
    }


def _drift(drift: Drift | None) -> dict[str, Any] | None:
    return None if drift is None else {"reason": drift.reason.value, "message": drift.message}


def _stream(stream: StreamView | None) -> dict[str, Any] | None:
    return None if stream is None else {"is_synced": stream.is_synced, **asdict(stream.counts)}


def _json(page: Any, status: int = 200) -> Response:
    return Response(encode(page), status, media_type="application/json")
