"""`polyphase advise`: from flags to a question, from an answer to a table, a plot and files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from polyphase.advisor.advice import Advice, Inquiry, Option, advise, question_of, reasons
from polyphase.advisor.calibration import Calibration
from polyphase.advisor.catalog import Library, model_from_text
from polyphase.advisor.deployment import Serving, Speculation, Traffic
from polyphase.advisor.estimate import Figure
from polyphase.advisor.fleet import parse_fleet
from polyphase.advisor.goal import Goal, traffic_from_requests
from polyphase.advisor.operator_tables import AIConfiguratorTables
from polyphase.advisor.outputs.launch_files import launch_files
from polyphase.advisor.outputs.page import as_page
from polyphase.advisor.outputs.records import advice_record, as_csv, record_of
from polyphase.advisor.second_opinion import NoAnswer, OperatorTables, SecondOpinion, taken_together
from polyphase.advisor.shapes import ModelShape
from polyphase.advisor.sizing import Sizing, size_for
from polyphase.cli.calibration import calibration_of, library_with, read_text
from polyphase.cli.scatter import scatter
from polyphase.core.errors import ConfigurationError

_AMOUNT = re.compile(r"\s*\$?(\d+(?:\.\d+)?(?:e\d+)?|\.\d+)\s*([a-zA-Z%/]*)\s*")
_WIDTH_FOR_INTERVALS = 105  # columns
_TIME_UNITS_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3, "min": 6e4}
_POWER_UNITS_KW = {"w": 1e-3, "kw": 1.0, "mw": 1e3}
_BOUND_WORDS = {
    "ttft_ms": ("TTFT", "ms"),
    "itl_ms": ("ITL", "ms"),
    "latency_ms": ("request latency", "ms"),
    "tok_s_per_user": ("speed for the user", "tokens/s"),
    "power_kw": ("power", "kW"),
    "dollars_per_hour": ("cost", "dollars an hour"),
}


@dataclass(frozen=True, slots=True)
class Flags:
    """As typed."""

    model: str
    fleet: list[str]
    isl: str | None = None
    osl: str | None = None
    lengths: str | None = None
    trace: Path | None = None
    prefix_hit: str | None = None
    rate: str | None = None
    ttft: str | None = None
    itl: str | None = None
    latency: str | None = None
    tok_s_per_user: str | None = None
    power: str | None = None
    cost: str | None = None
    backend: list[str] | None = None
    precision: list[str] | None = None
    serving: str | None = None
    mtp: str | None = None
    acceptance: str | None = None
    accelerator_file: list[Path] | None = None
    calibration: Path | None = None
    operator_tables: bool = False
    top: int = 5
    out: Path | None = None
    as_json: bool = False


def show_advice(flags: Flags) -> None:
    """Raises: ConfigurationError."""
    library = library_with(flags.accelerator_file or [])
    calibration = calibration_of(flags.calibration)
    shape, location = read_model(flags.model, library)
    inquiries = inquiries_of(flags, shape, library)
    console = Console(highlight=False, stderr=flags.as_json)
    if flags.rate is not None:
        _show_sizes(flags, calibration, inquiries, location, console)
        return
    tables = AIConfiguratorTables(location) if flags.operator_tables else None  # refused before the search, not after
    answers = _answers(calibration, inquiries, flags.top, console)
    opinions = [_second_opinions(tables, answer, console) if tables else [] for answer in answers]
    if flags.as_json:
        records = [_record(answer, own) for answer, own in zip(answers, opinions, strict=True)]
        print(json.dumps(records[0] if len(records) == 1 else records, indent=2))
    else:
        for answer, own in zip(answers, opinions, strict=True):
            _print_answer(answer, console)
            _print_opinions(answer, own, console)
        if any(answer.frontier for answer in answers):
            console.print(_plot(answers, console.width), markup=False)
    if flags.out is not None:
        _write(flags.out, answers, location, console)


def _answers(calibration: Calibration, inquiries: Sequence[Inquiry], top: int, console: Console) -> list[Advice]:
    answers = []
    with _progress(console) as progress:
        for inquiry in inquiries:
            task = progress.add_task(str(inquiry.fleet), total=None, count="")
            answers.append(advise(calibration, inquiry, top, _counting(progress, task)))
    return answers


def _second_opinions(tables: OperatorTables, answer: Advice, console: Console) -> list[SecondOpinion | NoAnswer]:
    """Of the best, in their order."""
    found: list[SecondOpinion | NoAnswer] = []
    with _progress(console) as progress:
        task = progress.add_task("asking the operator tables", total=None, count="")
        for number_, option in enumerate(answer.best):
            progress.update(task, count=f"{number_ + 1} of {len(answer.best)}")
            question = question_of(option.decode, option.prefill, option.concurrency, answer.inquiry.traffic)
            try:
                found.append(taken_together(option.estimate.itl_ms, tables.itl_ms(question)))
            except NoAnswer as nothing:
                found.append(nothing)
    return found


def _print_opinions(answer: Advice, opinions: Sequence[SecondOpinion | NoAnswer], console: Console) -> None:
    for place, (option, opinion) in enumerate(zip(answer.best, opinions, strict=False), start=1):
        if isinstance(opinion, NoAnswer):
            said = f"the operator tables have no answer ({opinion})"
        else:
            word = "contradict the interval: " if opinion.contradicts(option.estimate.itl_ms) else ""
            said = f"the operator tables {word}say ITL {_ms(opinion.itl_ms)}; taken together {_interval(opinion.together)}"
        console.print(f"{place}. {said}.", style="dim", markup=False)


def _record(answer: Advice, opinions: Sequence[SecondOpinion | NoAnswer]) -> dict[str, object]:
    record = advice_record(answer)
    for best, opinion in zip(record["best"], opinions, strict=False):
        if isinstance(opinion, SecondOpinion):
            both = opinion.together
            best["operators"] = {
                "itl_ms": opinion.itl_ms,
                "together_ms": both.value,
                "together_ms_low": both.low,
                "together_ms_high": both.high,
            }
        else:
            best["operators"] = {"no_answer": str(opinion)}
    return record


def _progress(console: Console) -> Progress:
    columns = (TextColumn("[progress.description]{task.description}"), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _counting(progress: Progress, task: object) -> Callable[[int], None]:
    return lambda count: progress.update(task, count=f"{count:,} deployments")  # type: ignore[arg-type]


# Flags to a question


def read_model(text: str, library: Library) -> tuple[ModelShape, str]:
    """The shape, and what engines would load. Raises: ConfigurationError."""
    path = Path(text).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and (path.is_dir() or path.is_file()):
        if not file.is_file():
            raise ConfigurationError(f"the folder {text} holds no model: it has no config.json")
        folder = file.resolve().parent  # absolute: launch files start elsewhere
        name = folder.name if path.is_dir() else file.stem
        return model_from_text(read_text(file, "model configuration"), str(file), name), str(folder)
    shape = library.model(text)
    hub_name = next((hub for hub, name in library.hub_names.items() if name == shape.name), text)
    return shape, text if "/" in text else hub_name


def inquiries_of(flags: Flags, shape: ModelShape, library: Library) -> list[Inquiry]:
    """One for each fleet. Raises: ConfigurationError."""
    goal = Goal(
        ttft_ms=_optional(flags.ttft, "--ttft", milliseconds),
        itl_ms=_optional(flags.itl, "--itl", milliseconds),
        latency_ms=_optional(flags.latency, "--latency", milliseconds),
        tok_s_per_user=_optional(flags.tok_s_per_user, "--tok-s-per-user", number),
        power_kw=_optional(flags.power, "--power", kilowatts),
        dollars_per_hour=_optional(flags.cost, "--cost", dollars),
    )
    inquiry = Inquiry(
        shape,
        parse_fleet(flags.fleet[0], library),
        traffic_of(flags),
        goal,
        tuple(flags.backend or ()),
        tuple(flags.precision or ()),
        _servings(flags.serving),
        _speculation(flags),
    )
    return [replace(inquiry, fleet=parse_fleet(text, library)) for text in flags.fleet]


def traffic_of(flags: Flags) -> Traffic:
    """Raises: ConfigurationError."""
    given = [name for name, value in (("--lengths", flags.lengths), ("--trace", flags.trace)) if value is not None]
    if flags.isl is not None or flags.osl is not None:
        given.append("--isl and --osl")
    if len(given) > 1:
        raise ConfigurationError(f"{' and '.join(given)} say the same in different ways; keep one")
    if flags.trace is not None:
        traffic = _trace(flags.trace)
    elif flags.lengths is not None:
        traffic = _distribution(flags.lengths)
    else:
        traffic = Traffic(_tokens(flags.isl, "--isl", 4000), _tokens(flags.osl, "--osl", 500))
    return replace(traffic, cached_tokens=_cached(flags.prefix_hit, traffic.isl)) if flags.prefix_hit else traffic


def _tokens(text: str | None, flag: str, default: int) -> float:
    if text is None:
        return default
    value = number(text, flag)
    if value < 1 or value != int(value):
        raise ConfigurationError(f"{flag} {text!r} is no number of tokens; write for example {flag} {default}")
    return value


def _distribution(text: str) -> Traffic:
    rows = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*(?::\s*(\d*\.?\d+)\s*)?", part)
        if not found:
            raise ConfigurationError(f"--lengths {text!r} is no distribution; write for example --lengths 1000/200:0.7,8000/500:0.3")
        rows.append((float(found[1]), float(found[2]), float(found[3] or 1)))
    if sum(share for _, _, share in rows) <= 0:
        raise ConfigurationError(f"--lengths {text!r}: the shares add up to nothing")
    isl, osl, share = zip(*rows, strict=True)
    return traffic_from_requests(isl, osl, weights=share)


def _trace(file: Path) -> Traffic:
    text = read_text(file, "trace")
    try:
        if text.lstrip().startswith("{"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            lengths = [(float(row["input_length"]), float(row["output_length"])) for row in rows]
        else:
            table = csv.DictReader(text.splitlines())
            lengths = [(float(row["ContextTokens"]), float(row["GeneratedTokens"])) for row in table]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{file} is no trace ({type(error).__name__}: {error}); "
            "each line must have input_length and output_length (JSON) or ContextTokens and GeneratedTokens (CSV)"
        ) from None
    usable = [(isl, osl) for isl, osl in lengths if 0 < isl < inf and 0 < osl < inf]
    if not usable:
        raise ConfigurationError(f"the trace {file} holds no request with tokens both in and out")
    return traffic_from_requests([isl for isl, _ in usable], [osl for _, osl in usable])


def _cached(text: str, isl: float) -> float:
    found = _AMOUNT.fullmatch(text)
    value = float(found[1]) if found and found[2] in ("", "%") else -1.0
    if found and found[2] == "%":
        value /= 100
    if value < 0 or (found and found[2] == "%" and value > 1):
        raise ConfigurationError(f"--prefix-hit {text!r} is neither a share nor tokens; write for example 40%, 0.4 or 1600")
    return value * isl if value <= 1 else value


def _servings(text: str | None) -> tuple[Serving, ...]:
    if text is None:
        return tuple(Serving)
    words = {
        "agg": Serving.AGGREGATED,
        "aggregated": Serving.AGGREGATED,
        "disagg": Serving.DISAGGREGATED,
        "disaggregated": Serving.DISAGGREGATED,
    }
    if text not in words:
        raise ConfigurationError(f"--serving {text!r} is neither agg nor disagg")
    return (words[text],)


def _speculation(flags: Flags) -> Speculation:
    draft = _optional(flags.mtp, "--mtp", number) or 0.0
    acceptance = _optional(flags.acceptance, "--acceptance", number)
    if draft != int(draft) or draft > 16:
        raise ConfigurationError(f"--mtp {flags.mtp!r} is no number of tokens from 0 to 16")
    if acceptance is not None and not 0 <= acceptance <= 1:
        raise ConfigurationError(f"--acceptance {flags.acceptance!r} is no share; write for example 0.8")
    return Speculation(int(draft), 0.8 if acceptance is None else acceptance)


def _optional(text: str | None, flag: str, parse: Callable[[str, str], float]) -> float | None:
    return None if text is None else parse(text, flag)


def milliseconds(text: str, flag: str) -> float:
    """`1s`, `20ms`. A number without a unit is refused: half of the readers would guess wrong."""
    return _in_units(text, flag, _TIME_UNITS_MS, "a time", "1s or 20ms")


def kilowatts(text: str, flag: str) -> float:
    return _in_units(text, flag, _POWER_UNITS_KW, "a power", "120kW or 1.5MW")


def dollars(text: str, flag: str) -> float:
    return _in_units(text, flag, {"": 1.0, "/h": 1.0, "usd": 1.0}, "a price an hour", "50")


def number(text: str, flag: str) -> float:
    return _in_units(text, flag, {"": 1.0, "/s": 1.0, "k": 1e3}, "a number", "500")


def _in_units(text: str, flag: str, units: dict[str, float], what: str, example: str) -> float:
    found = _AMOUNT.fullmatch(text.replace("µ", "u"))
    factor = units.get(found[2].lower()) if found else None
    if found is None or factor is None or float(found[1]) * factor == inf:
        raise ConfigurationError(f"{flag} {text!r} is not {what}; write for example {flag} {example}")
    return float(found[1]) * factor


# An answer to text and files


def _print_answer(answer: Advice, console: Console) -> None:
    q = answer.inquiry
    hit = f", {q.traffic.cached_tokens:.0f} cached" if q.traffic.cached_tokens else ""
    console.print(f"[bold]{escape(q.shape.name)}[/] on [bold]{q.fleet}[/], {q.traffic.isl:.0f} tokens in{hit}, {q.traffic.osl:.0f} out")
    console.print(f"{answer.evaluated:,} deployments evaluated, {answer.fitting:,} meet the goal", style="dim")
    if (short := answer.shortfall) is not None:
        words, unit = _BOUND_WORDS[short.bound]
        console.print(
            f"[yellow]Nothing meets the goal.[/] Nearest comes {escape(short.option.layout)} at batch {short.option.batch}: its {words} is "
            f"{short.reached:.4g} {unit} where {short.wanted:.4g} {unit} are asked, {short.factor:.2f} times off."
        )
        console.print(_table([short.option], console.width, len(q.fleet.pools) > 1))
        return
    console.print(_table(answer.best, console.width, len(q.fleet.pools) > 1))
    for number_, option in enumerate(answer.best[:3], start=1):
        said = reasons(option, answer)
        if console.width < _WIDTH_FOR_INTERVALS:
            e = option.estimate
            said.append(f"in 80 of 100 cases TTFT {_range(e.ttft_ms)} and ITL {_range(e.itl_ms)}")
        console.print(f"{number_}. {'; '.join(said)}.", style="dim", markup=False)


def _table(options: Sequence[Option], width: int, is_mixed: bool) -> Table:
    """Narrow terminals get no intervals, which stand below then; wide ones also what a megawatt and a dollar give.

    `is_mixed`: of a fleet of several kinds.
    """
    has_intervals, is_wide = width >= _WIDTH_FOR_INTERVALS, width >= 140
    table = Table(box=None, padding=(0, 2 if has_intervals else 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("deployment", overflow="fold")
    table.add_column("engine", overflow="fold")
    for heading in ("batch", "TTFT", "ITL", "tok/s/user", "tok/s/acc.", *(("tok/s/MW", "$/Mtok", "J/tok") if is_wide else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, option in enumerate(options, start=1):
        e, setting = option.estimate, option.decode.setting
        wide = (_count(option.tok_s_per_mw), f"{option.dollars_per_mtok:.2f}", f"{option.joule_per_token:.2f}") if is_wide else ()
        table.add_row(
            str(place),
            option.layout + (f" ({_where(option)})" if is_mixed else ""),
            f"{setting.backend} {setting.precision.name}",
            str(option.batch),
            *(_interval(figure) if has_intervals else _ms(figure.value) for figure in (e.ttft_ms, e.itl_ms)),
            f"{e.tok_s_per_user:.1f}",
            _count(option.tok_s_per_gpu),
            *wide,
        )
    return table


def _where(option: Option) -> str:
    """`on h100`, or `prefill on h100, decode on b200`."""
    decode = option.decode.setting.accelerator.name
    prefill = option.prefill.setting.accelerator.name if option.prefill else decode
    return f"on {decode}" if prefill == decode else f"prefill on {prefill}, decode on {decode}"


def _range(figure: Figure) -> str:
    return f"{_ms(figure.low)} to {_ms(figure.high)}"


def _interval(figure: Figure) -> str:
    """`812 ms ±18%`: half of the 80 % interval, as a share."""
    return f"{_ms(figure.value)} ±{100 * (figure.high / figure.value - 1):.0f}%"


def _ms(value: float) -> str:
    if value >= 1000:
        return f"{value / 1e3:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _plot(answers: Sequence[Advice], width: int) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for answer in answers:
        for option in answer.frontier:
            kind = "disaggregated" if option.is_disaggregated else "aggregated"
            name = f"{answer.inquiry.fleet} {kind}" if len(answers) > 1 else kind
            series.setdefault(name, []).append((option.estimate.tok_s_per_user, option.tok_s_per_gpu))
    return scatter(series, "tokens/s per user", "tokens/s per accelerator", width=min(width, 100), height=16)


def _write(folder: Path, answers: Sequence[Advice], location: str, console: Console) -> None:
    """Raises: ConfigurationError."""
    files = {"page.html": as_page(answers, location)}
    records = [advice_record(answer) for answer in answers]
    files["advice.json"] = json.dumps(records[0] if len(records) == 1 else records, indent=2) + "\n"
    files["frontier.csv"] = as_csv([option for answer in answers for option in answer.frontier])
    best = next((answer for answer in answers if answer.best), None)
    if best is not None:
        for name, text in launch_files(best.best[0], location, best.inquiry.traffic).items():
            files[f"launch/{name}"] = text
    _write_files(folder, files, console)


def _write_files(folder: Path, files: Mapping[str, str], console: Console) -> None:
    """Raises: ConfigurationError."""
    try:
        for name, text in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            if file.suffix == ".sh":
                file.chmod(0o755)
    except OSError as error:
        raise ConfigurationError(f"cannot write to {folder}: {error.strerror}") from None
    console.print(f"wrote {', '.join(sorted(files))} to {folder}", style="dim", markup=False)


def _show_sizes(flags: Flags, calibration: Calibration, inquiries: Sequence[Inquiry], location: str, console: Console) -> None:
    """Raises: ConfigurationError."""
    rate = number(flags.rate or "", "--rate")
    sizes = []
    with _progress(console) as progress:
        for inquiry in inquiries:
            task = progress.add_task(str(inquiry.fleet), total=None, count="")
            sizes.append(size_for(calibration, inquiry, rate, _counting(progress, task)))
    records = [_size_record(size, inquiry, rate) for size, inquiry in zip(sizes, inquiries, strict=True)]
    if flags.out is not None:
        whole = replace(sizes[0].option, units=sizes[0].units)
        files = {f"launch/{name}": text for name, text in launch_files(whole, location, inquiries[0].traffic).items()}
        _write_files(flags.out, {"sizes.json": json.dumps(records, indent=2) + "\n", **files}, console)
    if flags.as_json:
        print(json.dumps(records, indent=2))
        return
    for size, inquiry in zip(sizes, inquiries, strict=True):
        console.print(
            f"[bold]{size.gpu_count} accelerators[/] carry {rate:g} requests/s of {escape(inquiry.shape.name)} on {inquiry.fleet}: "
            f"{size.units} x ({escape(size.option.layout.removeprefix('1 x '))}), "
            f"{100 * size.slots_used:.0f}% of their places used on average"
        )
        if not size.is_within_fleet:
            console.print(f"[yellow]That is {size.gpu_count - inquiry.fleet.gpu_count} more than the fleet has.[/]")
        for line in _broken_bounds(size, inquiry):
            console.print(f"[yellow]{line}[/]")
        console.print(_table([size.option], console.width, len(inquiry.fleet.pools) > 1))


def _broken_bounds(size: Sizing, inquiry: Inquiry) -> list[str]:
    """Of the whole that a rate needs, which has the fewest accelerators, not the least power or price."""
    power_kw, dollars = size.units * size.option.power_kw, size.units * size.option.dollars_per_hour
    bounds = inquiry.goal
    said = []
    if bounds.power_kw is not None and power_kw > bounds.power_kw:
        said.append(f"That takes {power_kw:.4g} kW where {bounds.power_kw:.4g} kW are allowed.")
    if bounds.dollars_per_hour is not None and dollars > bounds.dollars_per_hour:
        said.append(f"That costs ${dollars:.4g} an hour where ${bounds.dollars_per_hour:.4g} are allowed.")
    return said


def _size_record(size: Sizing, inquiry: Inquiry, rate: float) -> dict[str, object]:
    return {
        "fleet": str(inquiry.fleet),
        "requests_per_s": rate,
        "gpus": size.gpu_count,
        "units": size.units,
        "is_within_fleet": size.is_within_fleet,
        "slots_used": round(size.slots_used, 3),
        "power_kw": round(size.units * size.option.power_kw, 3),
        "dollars_per_hour": round(size.units * size.option.dollars_per_hour, 2),
        "broken_bounds": _broken_bounds(size, inquiry),
        "unit": record_of(size.option),
    }
