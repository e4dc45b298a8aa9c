"""The commands and their flags. Flags left out are None here; `config` knows the defaults, and may find a value elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from polyphase.cli.advisor_commands import add_advisor_commands
from polyphase.cli.join import HELP, join_command
from polyphase.cli.router import router_commands
from polyphase.core.errors import PolyphaseError
from polyphase.wire.cards import Role


class _Group(TyperGroup):
    """Errors that we raise on purpose are one sentence on standard error and exit code 1, never a traceback."""

    def invoke(self, ctx: Any) -> Any:  # typer's or click's Context, by the version of typer
        try:
            return super().invoke(ctx)
        except PolyphaseError as error:
            typer.secho("error: ", err=True, fg="red", nl=False)
            typer.echo(error.message, err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    help="Serve large language models over many accelerators: disaggregated prefill and decode, KV-aware routing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "Processes and model"
_SERVER = "Server"
_ROUTER = "Router"
_ENGINE = "Engine"
_MOCK = "Mock engine"
_SERVED = "Engines that are servers of their own (vllm, sglang, trtllm, openai); see docs/engines.md"
_QUEUE = "Waiting requests"


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from polyphase import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


Name = Annotated[str | None, typer.Option("--name", help="Which deployment, where several run on this machine.")]


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a name on the Hugging Face hub (Qwen/Qwen3-0.6B), or demo. Several: in --config.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Workers that prefill and decode. [default: 1]", rich_help_panel=_MODEL)] = None,
    prefill: Annotated[int | None, typer.Option(help="Workers that only prefill.", rich_help_panel=_MODEL)] = None,
    decode: Annotated[int | None, typer.Option(help="Workers that decode.", rich_help_panel=_MODEL)] = None,
    name: Annotated[str | None, typer.Option(help="Name of this deployment. [default: default]", rich_help_panel=_MODEL)] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. [default: its folder or hub name]", rich_help_panel=_MODEL)
    ] = None,
    aliases: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Further names that clients may call it by.", rich_help_panel=_MODEL)
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(metavar="NAME=FOLDER,…", help="LoRA adapters, each served as a model of this name.", rich_help_panel=_MODEL),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Workers of one model and group share a weight. [default: the engine]", rich_help_panel=_MODEL),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER",
            help="The group's part of the model's requests beside other groups'; 0: only what no other can take. See docs/models.md.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all. [default: 127.0.0.1]", rich_help_panel=_SERVER)
    ] = None,
    port: Annotated[str | None, typer.Option(metavar="PORT", help="[default: 8000]", rich_help_panel=_SERVER)] = None,
    frontends: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="Each listens at a port of its own, from PORT on. [default: 1]", rich_help_panel=_SERVER),
    ] = None,
    policy: Annotated[str | None, typer.Option(help="kv, least-loaded or round-robin. [default: kv]", rich_help_panel=_ROUTER)] = None,
    router_weights: Annotated[
        str | None,
        typer.Option(
            metavar="PART=WEIGHT,…",
            help="Reasons against a worker and what one unit of each weighs, in tokens of prefill, such as uncached=2,requests=50; "
            "0 switches one off. polyphase router parts lists them. [default: the policy's]",
            rich_help_panel=_ROUTER,
        ),
    ] = None,
    router_temperature: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER",
            help="0: the best worker; 1: one with half the score half as often. [default: 0]",
            rich_help_panel=_ROUTER,
        ),
    ] = None,
    router_filters: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Filters of your own package, beside ours.", rich_help_panel=_ROUTER)
    ] = None,
    router_picker: Annotated[
        str | None, typer.Option(metavar="NAME", help="best, or one of your own package. [default: best]", rich_help_panel=_ROUTER)
    ] = None,
    session_idle: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long the router remembers where a session was. [default: 10min]", rich_help_panel=_ROUTER),
    ] = None,
    split_threshold: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Split every prompt with so many tokens to compute. [default: from 256 on, where it pays]",
            rich_help_panel=_ROUTER,
        ),
    ] = None,
    split_fraction: Annotated[
        str | None,
        typer.Option(
            metavar="FRACTION",
            help="And so do prompts of which less than this is to compute. [default: 0.3]",
            rich_help_panel=_ROUTER,
        ),
    ] = None,
    kv_flow: Annotated[
        str | None,
        typer.Option(
            metavar="on|off",
            help="off: a split prompt's KV goes to the decode worker only when all of it is computed. [default: on]",
            rich_help_panel=_ROUTER,
        ),
    ] = None,
    kv_pull: Annotated[
        str | None,
        typer.Option(
            metavar="on|off",
            help="off: what another worker has cached of a prompt is computed again, not pulled from there. [default: on]",
            rich_help_panel=_ROUTER,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUE,…", help="Of the workers, such as zone=eu-1,rack=7; see docs/router.md.", rich_help_panel=_MODEL),
    ] = None,
    kv_events: Annotated[
        str | None,
        typer.Option(
            metavar="on|off",
            help="off: the router goes by what it sent to a worker, not by what the worker tells. [default: on]",
            rich_help_panel=_ROUTER,
        ),
    ] = None,
    predicted_lifetime: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long it does, for workers that tell nothing. [default: 2min]", rich_help_panel=_ROUTER),
    ] = None,
    index_capacity: Annotated[
        str | None,
        typer.Option(metavar="BLOCKS", help="What the router's prefix index holds at most. [default: 4000000]", rich_help_panel=_ROUTER),
    ] = None,
    drain_timeout: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="What running requests get to finish at the end. [default: 30s]", rich_help_panel=_SERVER),
    ] = None,
    start_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Longest start, downloads included. [default: 10min]", rich_help_panel=_SERVER)
    ] = None,
    max_queued_requests: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="Wait here while every worker is saturated; 0: none. [default: 4096]", rich_help_panel=_QUEUE),
    ] = None,
    max_queued_per_tenant: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Of these, of one tenant. [default: no limit of its own]", rich_help_panel=_QUEUE)
    ] = None,
    max_queue_wait: Annotated[
        str | None, typer.Option(metavar="TIME", help="What cannot begin by then gets 429. [default: 60s]", rich_help_panel=_QUEUE)
    ] = None,
    tenant_weights: Annotated[
        str | None,
        typer.Option(metavar="NAME=WEIGHT,…", help="Shares while requests wait. [default: 1 each]", rich_help_panel=_QUEUE),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="torch, vllm, sglang, trtllm, openai, mock, or module:function. [default: torch]", rich_help_panel=_ENGINE),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … [default: auto]", rich_help_panel=_ENGINE)] = None,
    accelerators: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="GPUs of each worker; --engine-args tells it so. [default: 1]", rich_help_panel=_SERVED),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: auto]", rich_help_panel=_ENGINE)] = None,
    kv_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="KV cache per worker, such as 2GiB. [default: what fits]", rich_help_panel=_ENGINE)
    ] = None,
    block_size: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Tokens in a KV block. [default: 16; vllm: its own]", rich_help_panel=_ENGINE)
    ] = None,
    context_length: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Prompt and output together. [default: the model's]", rich_help_panel=_ENGINE)
    ] = None,
    max_batch_tokens: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Most tokens in one engine step.", rich_help_panel=_ENGINE)
    ] = None,
    max_running: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Most requests in one engine step.", rich_help_panel=_ENGINE)
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Threads of each worker. [default: its share of the cores]", rich_help_panel=_ENGINE)
    ] = None,
    attach: Annotated[
        str | None, typer.Option(metavar="URL,…", help="Engine servers that run already, a worker for each.", rich_help_panel=_SERVED)
    ] = None,
    engine_python: Annotated[
        str | None,
        typer.Option(metavar="PROGRAM", help="Python of the environment that the engine is installed in.", rich_help_panel=_SERVED),
    ] = None,
    engine_command: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="In place of the engine's own, such as vllm serve.", rich_help_panel=_SERVED)
    ] = None,
    engine_args: Annotated[
        str | None, typer.Option(metavar="FLAGS", help="Further flags of the engine's server, as in a shell.", rich_help_panel=_SERVED)
    ] = None,
    engine_api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the API key of an attached server; never the key itself. "
            "[default: POLYPHASE_ENGINE_API_KEY]",
            rich_help_panel=_SERVED,
        ),
    ] = None,
    mock_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="llama-3.1-70b, or parameters=8e9,layers=32,… [default: llama-3.1-8b]", rich_help_panel=_MOCK),
    ] = None,
    mock_accelerator: Annotated[
        str | None, typer.Option(metavar="NAME", help="4xh100, or tflops=989,… [default: h100]", rich_help_panel=_MOCK)
    ] = None,
    mock_speedup: Annotated[
        str | None, typer.Option(metavar="FACTOR", help="10, or inf: steps take no time. [default: 1]", rich_help_panel=_MOCK)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with any of these settings; flags and POLYPHASE_… variables win.")
    ] = None,
) -> None:
    """Serve a model behind an OpenAI-compatible server.

    Example: polyphase serve demo --prefill 1 --decode 2
    """
    flags = {key: value for key, value in locals().items() if key != "config"}
    from polyphase.cli.serve import serve_model

    serve_model(flags, config)


join = join_command(serve, (_MODEL, _ENGINE, _MOCK, _SERVED))
app.command("join", help=HELP)(join)


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Exit after the conversation.")] = False,
    port: Annotated[int | None, typer.Option(help="[default: 8000, or a free one]")] = None,
    name: Annotated[str, typer.Option(help="Name of this deployment.")] = "demo",
) -> None:
    """Serve the model that comes with Polyphase over four processes, and show it in a conversation."""
    from polyphase.cli.demo import show_demo

    show_demo(port=port, name=name, is_once=once)


@app.command()
def status(
    name: Name = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing, until Ctrl-C.")] = False,
) -> None:
    """Show the workers of the running deployment: roles, load, KV use, hit rate."""
    from polyphase.cli.status import show_status

    show_status(name, is_watching=watch)


@app.command()
def role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its id, as status shows it.")],
    role: Annotated[Role, typer.Argument(help="What it is for from now on.", show_choices=True)],
    force: Annotated[bool, typer.Option("--force", help="Even if nobody is left who decodes.")] = False,
    name: Name = None,
) -> None:
    """Give a running worker another role. Its model stays loaded, and its requests go on, here or elsewhere.

    Example: polyphase role decode-1 prefill
    """
    from polyphase.cli.role import change_role

    change_role(worker, role, name, is_forced=force)


@app.command()
def sleep(worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its id, as status shows it.")], name: Name = None) -> None:
    """Put a worker to sleep: its requests go elsewhere or end, and its engine gives the accelerator's memory free."""
    from polyphase.cli.sleep import change_sleep

    change_sleep(worker, name, is_asleep=True)


@app.command()
def wake(worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its id, as status shows it.")], name: Name = None) -> None:
    """Wake a worker that sleeps."""
    from polyphase.cli.sleep import change_sleep

    change_sleep(worker, name, is_asleep=False)


@app.command()
def explain(
    request_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="Header x-request-id, or the answer's id. [default: the latest request]")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A frontend. [default: the running deployment's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The record itself.")] = False,
    name: Name = None,
) -> None:
    """Tell why a request went where it went, and what became of it."""
    from polyphase.cli.explain import show_explanation

    show_explanation(request_id, url=url, name=name, is_json=as_json)


@app.command()
def chat(
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server. [default: the running deployment]")] = None,
    model: Annotated[str | None, typer.Option(help="[default: the first that the server lists]")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 is greedy. [default: the model's]")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 512,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    name: Name = None,
) -> None:
    """Chat with a served model in the terminal."""
    from polyphase.cli.chat import ChatSettings, chat_in_terminal

    chat_in_terminal(url, name, ChatSettings(model=model, temperature=temperature, max_tokens=max_tokens, system=system))


app.add_typer(router_commands, name="router")


@app.command()
def doctor() -> None:
    """Say what is missing on this machine, and how to mend it."""
    from polyphase.cli.doctor import show_checks

    raise typer.Exit(show_checks())


add_advisor_commands(app)


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)
