"""A worker's transfer agent, and the registration of its engine's blocks with it, if these are for others to read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from polyphase.core.errors import ConfigurationError
from polyphase.engines.interface import Engine, KvExporter
from polyphase.transfer import Agent, Region
from polyphase.transfer.agent import default_backends
from polyphase.transfer.backends.cuda import CudaBackend
from polyphase.transfer.backends.interface import Backend
from polyphase.wire.cards import WorkerEntry
from polyphase.worker.engines import kv_exporter, kv_sender
from polyphase.worker.options import TransferOptions

log = logging.getLogger(__name__)


@contextmanager
def join_transfer(engine: Engine, entry: WorkerEntry, unix_path: str, options: TransferOptions) -> Iterator[tuple[Agent, Region | None]]:
    """The agent, and the region of the engine's blocks if it can offer them; both end with the block.

    Raises: ConfigurationError if the agent cannot listen, or its token cannot be read.
    """
    token = _token(options)
    if options.address is not None and not token:
        log.warning("without --transfer-token-file anybody who reaches %s can read the KV of all requests", options.address)
    exporter = kv_exporter(engine)
    with ExitStack() as stack:
        agent = stack.enter_context(
            Agent(
                entry.worker_id,
                backends=_backends(exporter),
                epoch=entry.epoch,
                unix_path=unix_path,
                tcp_address=options.address,
                token=token,
            )
        )
        for name, reason in agent.unavailable.items():
            log.warning("blocks cannot be moved by %s here: %s", name, reason)
        region: Region | None = None
        if exporter is not None:
            region = stack.enter_context(agent.register(exporter.kv_memory, exporter.kv_layout))
            exporter.bind_offers(
                worker_id=entry.worker_id,
                epoch=entry.epoch,
                endpoint=entry.request_endpoint,
                agent=agent.card_with(region.card),
                region_id=region.region_id,
            )
        sender = kv_sender(engine)
        if sender is not None:
            sender.bind_offers(worker_id=entry.worker_id, epoch=entry.epoch, endpoint=entry.request_endpoint)
        yield agent, region


def _backends(exporter: KvExporter | None) -> list[Backend]:
    """`cuda` only beside an engine that has its blocks there: it takes device memory of its own."""
    is_on_device = exporter is not None and exporter.kv_memory.kind == "cuda"
    return [CudaBackend(), *default_backends()] if is_on_device else default_backends()


def _token(options: TransferOptions) -> bytes:
    if options.token_file is None:
        return b""
    try:
        token = options.token_file.read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(f"the transfer token cannot be read from {options.token_file}: {error.strerror}") from error
    if len(token) < 16:
        raise ConfigurationError(f"the transfer token in {options.token_file} has {len(token)} bytes; it must have at least 16")
    return token
