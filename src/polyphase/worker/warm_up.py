"""One tiny request before a worker shows itself, so that the first client does not wait for kernels to be chosen and buffers made."""

from __future__ import annotations

import asyncio

from polyphase.core.errors import ModelLoadError, PolyphaseError
from polyphase.engines.interface import Engine, StepReport
from polyphase.wire.events import KvEvent
from polyphase.wire.requests import FinishReason, SamplingParams, SequenceOutput, StopConditions, Submit

TIMEOUT_S = 300.0
REQUEST_ID = "warm-up"


async def warm_up(engine: Engine) -> list[KvEvent]:
    """Compute a few tokens. No full block of prompt is left in the cache. An engine that does one half only has warmed up by itself.

    Returns: KV events meanwhile, to be published: an engine that ran before us tells what it holds.

    Raises: ModelLoadError if the engine fails at it.
    """
    card = engine.card
    if not card.serves_whole:
        return []
    prompt = [card.bos_token_id or 0] * min(4, card.block_size, card.context_length - 1)
    request = Submit(
        request_id=REQUEST_ID,
        token_ids=prompt,
        prompt_token_count=len(prompt),
        sampling=SamplingParams(seed=0, temperature=0.0),
        stop=StopConditions(max_tokens=2, ignore_eos=True),
    )
    last: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()

    events: list[KvEvent] = []

    def on_step(report: StepReport) -> None:
        events.extend(report.events)
        for output in report.outputs:
            if output.finish_reason is not None and not last.done():
                last.set_result(output)

    steps = asyncio.create_task(engine.run(on_step), name="warm-up")
    steps.add_done_callback(lambda _: last.cancel())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            engine.submit(request)
            await asyncio.wait({last})
    except TimeoutError:
        raise ModelLoadError(f"the model computed no token within {TIMEOUT_S:.0f} s") from None
    except PolyphaseError as error:
        raise ModelLoadError(f"the model cannot compute its first token: {error.message}") from error
    finally:
        steps.cancel()
        await asyncio.wait({steps})
    if last.cancelled():
        raise ModelLoadError("the engine ended while it computed its first token") from (None if steps.cancelled() else steps.exception())
    output = last.result()
    if output.finish_reason is FinishReason.ERROR:
        reason = output.failure.message if output.failure else "no reason given"
        raise ModelLoadError(f"the model cannot compute its first token: {reason}")
    return events
