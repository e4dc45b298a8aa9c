"""The advisor's commands and their flags. Nothing heavy is imported until one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TRAFFIC = "Traffic"
_GOAL = "Goal"
_CHOICE = "What may be used"
_OUTPUT = "Output"

Calibrated = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="Made by `polyphase advisor calibrate`. [default: ours]")
]
Sheets = Annotated[
    list[Path] | None, typer.Option("--accelerator-file", metavar="FILE", help="Datasheet of an accelerator of your own; may be repeated.")
]


def add_advisor_commands(app: typer.Typer) -> None:
    """Adds `advise`, and the group `advisor`."""
    app.command()(advise)
    group = typer.Typer(help="Calibrate and judge the performance model behind `polyphase advise`.", no_args_is_help=True)
    group.command()(calibrate)
    group.command()(evaluate)
    group.command(name="list")(list_known)
    app.add_typer(group, name="advisor")


def advise(
    model: Annotated[str, typer.Argument(help="deepseek-v3, a name on the hub, a folder with config.json, or that file.")],
    fleet: Annotated[
        list[str], typer.Option(metavar="FLEET", help="16xh200 or 16xh100+8xb200; repeat to compare.", rich_help_panel=_CHOICE)
    ],
    isl: Annotated[str | None, typer.Option(metavar="TOKENS", help="Prompt. [default: 4000]", rich_help_panel=_TRAFFIC)] = None,
    osl: Annotated[str | None, typer.Option(metavar="TOKENS", help="Answer. [default: 500]", rich_help_panel=_TRAFFIC)] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="ISL/OSL:SHARE,…", help="Instead: a distribution, 1000/200:0.7,8000/500:0.3.", rich_help_panel=_TRAFFIC),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead: a trace, as JSON lines (Mooncake) or CSV (Azure).", rich_help_panel=_TRAFFIC),
    ] = None,
    prefix_hit: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Of the prompt that is cached: 40%, 0.4, or 1600 tokens.", rich_help_panel=_TRAFFIC)
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="REQUESTS/S", help="How many accelerators does this rate need?", rich_help_panel=_TRAFFIC)
    ] = None,
    ttft: Annotated[str | None, typer.Option(metavar="TIME", help="Time to first token, such as 1s.", rich_help_panel=_GOAL)] = None,
    itl: Annotated[str | None, typer.Option(metavar="TIME", help="Time between tokens, such as 20ms.", rich_help_panel=_GOAL)] = None,
    latency: Annotated[str | None, typer.Option(metavar="TIME", help="Of a whole request, such as 12s.", rich_help_panel=_GOAL)] = None,
    tok_s_per_user: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Tokens per second for each user, at least.", rich_help_panel=_GOAL)
    ] = None,
    power: Annotated[
        str | None, typer.Option(metavar="POWER", help="Of the deployment, all-in, such as 120kW.", rich_help_panel=_GOAL)
    ] = None,
    cost: Annotated[str | None, typer.Option(metavar="DOLLARS", help="An hour, such as 50.", rich_help_panel=_GOAL)] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="trtllm, sglang or vllm; may be repeated. [default: all]", rich_help_panel=_CHOICE)
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="bf16, fp8, nvfp4 …; may be repeated. [default: what makes sense]", rich_help_panel=_CHOICE)
    ] = None,
    serving: Annotated[str | None, typer.Option(help="agg or disagg. [default: both]", rich_help_panel=_CHOICE)] = None,
    mtp: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Tokens drafted in each step. [default: 0]", rich_help_panel=_CHOICE)
    ] = None,
    acceptance: Annotated[
        str | None, typer.Option(metavar="SHARE", help="How often a drafted token is accepted. [default: 0.8]", rich_help_panel=_CHOICE)
    ] = None,
    accelerator_file: Sheets = None,
    calibration: Calibrated = None,
    operator_tables: Annotated[
        bool,
        typer.Option("--operator-tables", help="Ask AIConfigurator's as well: pip install 'polyphase[advisor]'.", rich_help_panel=_OUTPUT),
    ] = False,
    top: Annotated[int, typer.Option(min=1, max=50, help="Rows of the table.", rich_help_panel=_OUTPUT)] = 5,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write page.html, frontier.csv, advice.json and launch files.", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole answer, for programs.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Say which parallelism, precision, batch and split meet a goal, what that gives, how sure it is, and how to start it.

    Example: polyphase advise llama-3.1-70b --fleet 16xh200 --isl 4000 --osl 500 --ttft 1s --itl 20ms --out advice
    """
    flags = dict(locals())
    from polyphase.cli.advise import Flags, show_advice

    show_advice(Flags(**flags))


def calibrate(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="CSV with the columns of silicon_measured.csv.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the coefficients.")] = Path("calibration.json"),
    licence: Annotated[str, typer.Option(help="Of the data, for the provenance.")] = "",
    accelerator_file: Sheets = None,
    as_json: Annotated[bool, typer.Option("--json", help="The cross-validated errors, for programs.")] = False,
) -> None:
    """Fit the performance model to measured serving points, and say how well it predicts those held out."""
    from polyphase.cli.calibration import calibrate_on

    calibrate_on(data, out, licence, accelerator_file or [], is_json=as_json)


def evaluate(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="CSV with the columns of silicon_measured.csv.")],
    calibration: Calibrated = None,
    accelerator_file: Sheets = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare predictions with a table of measurements: errors in total and by group, and how often the intervals hold."""
    from polyphase.cli.calibration import evaluate_on

    evaluate_on(data, calibration, accelerator_file or [], is_json=as_json)


def list_known() -> None:
    """List the models and accelerators that the advisor knows by name."""
    from polyphase.cli.calibration import show_known

    show_known()
