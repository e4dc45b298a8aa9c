"""`polyphase demo`: four processes on the shipped model, a conversation with them, and what each request did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyphase.cli.conversation import (
    CONVERSATION,
    MAX_TOKENS,
    SPLIT_THRESHOLD_TOKENS,
    SYSTEM_PROMPT,
    TEMPERATURE,
    VISITORS,
    OwnConversation,
)
from polyphase.cli.narrator import curl_example
from polyphase.cli.serve import run_in_foreground
from polyphase.config import format_bytes, load_serve_settings
from polyphase.core.errors import ConfigurationError, PolyphaseError
from polyphase.launch import DeploymentPlan, LocalDeployment, plan_deployment
from polyphase.launch.ports import free_port, is_port_free

if TYPE_CHECKING:
    from openai import AsyncOpenAI

DEFAULT_PORT = 8000
HOST = "127.0.0.1"
KV_MEMORY = "256MiB"  # per worker: plenty for this model, and quickly had
Record = dict[str, Any]


class DemoFailed(PolyphaseError):
    """The conversation could not be held to its end."""

    code = "demo_failed"
    stage = "client"


def show_demo(*, port: int | None, name: str, is_once: bool) -> None:
    """Raises: ConfigurationError, StartFailed, DemoFailed."""
    console = Console(highlight=False)
    if port is None:
        port = DEFAULT_PORT if is_port_free(HOST, DEFAULT_PORT) else free_port(HOST)
    flags = {
        "model": "demo",
        "name": name,
        "host": HOST,
        "port": port,
        "prefill": 1,
        "decode": 2,
        "split_threshold": SPLIT_THRESHOLD_TOKENS,
        "kv_memory": KV_MEMORY,
    }
    plan = plan_deployment(load_serve_settings(flags, {}))

    async def converse(deployment: LocalDeployment) -> None:
        client = await asyncio.to_thread(_openai_client, plan.url)  # importing it takes a second
        async with client, httpx.AsyncClient(base_url=plan.url, trust_env=False) as http:
            visitor = Visitor(client, http, plan.model.served_name)
            records = await hold_conversation(console, visitor)
            records += await ask_all_at_once(console, visitor)
        console.print()
        console.print(record_table(records))
        if is_once:
            deployment.stop()
        else:
            _print_try_next(console, plan)

    run_in_foreground(plan, lambda hear: LocalDeployment(plan, hear), console, converse)


def _openai_client(url: str) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient
    except ImportError:
        raise ConfigurationError("the demo talks through OpenAI's SDK, which is missing; install it with: pip install openai") from None
    # A client without proxies: a proxy set in the environment knows nothing of this machine's loopback.
    http = DefaultAsyncHttpxClient(trust_env=False)
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http)


class Visitor:
    """Asks through OpenAI's SDK, and looks up what the frontend recorded of each request."""

    def __init__(self, client: AsyncOpenAI, http: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._http = http
        self._model = model

    async def ask(self, messages: list[Any], on_text: Callable[[str], None] = lambda text: None) -> tuple[str, Record]:
        """The whole answer, and the record; `on_text` gets the answer's pieces as they come.

        Raises: DemoFailed.
        """
        from openai import OpenAIError

        answer = ""
        try:
            stream = await self._client.chat.completions.create(
                model=self._model, messages=messages, stream=True, temperature=TEMPERATURE, max_tokens=MAX_TOKENS
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    if piece := choice.delta.content:
                        answer += piece
                        on_text(piece)
            found = await self._http.get(f"/debug/requests/{stream.response.headers['x-request-id']}")
            record: Record = found.raise_for_status().json()
        except (OpenAIError, httpx.HTTPError) as error:
            raise DemoFailed(f"the demo's conversation broke off: {error}") from error
        return answer, record


async def hold_conversation(console: Console, visitor: Visitor) -> list[Record]:
    """One visitor, several turns, replies streamed to the terminal."""
    console.print("\n[bold]A conversation[/] [dim]through OpenAI's SDK; each turn sends all of it again[/]")
    console.print(f"[dim]Where {SPLIT_THRESHOLD_TOKENS} tokens or more are new, a prefill worker reads them.[/]")
    messages: list[Any] = [{"role": "system", "content": SYSTEM_PROMPT}]
    records = []
    for question in CONVERSATION:
        messages.append({"role": "user", "content": question})
        console.print(Text.assemble(("you    ", "bold green"), question), soft_wrap=True)
        console.print(Text("model  ", "bold cyan"), end="")
        answer, record = await visitor.ask(messages, lambda piece: console.print(_indented(piece), end="", markup=False, soft_wrap=True))
        console.print()
        console.print(Text(f"       {route_phrase(record)}", "dim"), soft_wrap=True)
        messages.append({"role": "assistant", "content": answer})
        records.append(record)
    return records


async def ask_all_at_once(console: Console, visitor: Visitor) -> list[Record]:
    """Several visitors at the same time, each with a conversation of their own after the system prompt that they share."""
    console.print(f"\n[bold]{len(VISITORS)} others at once,[/] [dim]each in a conversation of their own, under the same system prompt[/]")
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(visitor.ask(_messages_of(talk))) for talk in VISITORS]
    records = []
    for talk, task in zip(VISITORS, asked, strict=True):
        answer, record = task.result()
        console.print(Text.assemble(("you    ", "bold green"), talk.question), soft_wrap=True)
        console.print(Text.assemble(("model  ", "bold cyan"), _indented(answer.strip())), soft_wrap=True)
        console.print(Text(f"       {route_phrase(record)}", "dim"), soft_wrap=True)
        records.append(record)
    return records


def _messages_of(talk: OwnConversation) -> list[Any]:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for question, answer in talk.earlier:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": talk.question}]


def _indented(text: str) -> str:
    """Further lines begin below the first one's text."""
    return text.replace("\n", "\n       ")


def route_phrase(record: Record) -> str:
    """What one request did, in words: `prefill on prefill-0, decode on decode-1; …`."""
    prompt, cached = record["prompt_tokens"], record["cached_tokens"]
    if not record["split"]:
        return f"prefill and decode on {record['decode_worker']}; {cached} of {prompt} prompt tokens cached"
    way = f"prefill on {record['prefill_worker']}, decode on {record['decode_worker']}"
    return f"{way}; {cached} of {prompt} prompt tokens cached, {format_bytes(record['kv_bytes_moved'])} of KV moved"


def record_table(records: list[Record]) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(header_style="dim", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "prefill on", "decode on"):
        table.add_column(heading, no_wrap=True)
    for heading in ("prompt", "cached", "KV moved", "output", "TTFT", "ITL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, record in enumerate(records, start=1):
        moved = record["kv_bytes_moved"]
        table.add_row(
            str(number),
            record["prefill_worker"],
            record["decode_worker"],
            str(record["prompt_tokens"]),
            str(record["cached_tokens"]),
            format_bytes(moved) if moved else "-",
            str(record["completion_tokens"]),
            _milliseconds(record["ttft_ms"]),
            _milliseconds(record["itl_ms_mean"]),
        )
    table.caption = "prompt, cached, output: tokens; cached: where it was prefilled"
    table.caption_justify = "left"
    return table


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _print_try_next(console: Console, plan: DeploymentPlan) -> None:
    console.print(f"\n[bold]The server stays up at {plan.url}/v1[/] until Ctrl-C. In another terminal, try:")
    for command in (
        curl_example(plan),
        "polyphase chat",
        "polyphase status --watch",
        "polyphase serve Qwen/Qwen3-0.6B --port 8001",
    ):
        console.print(Text(f"  {command}", "cyan"), soft_wrap=True)
