"""`polyphase advisor calibrate | evaluate | list`: reads tables, writes coefficients, prints errors."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from polyphase import __version__
from polyphase.advisor.calibrate import cross_validated
from polyphase.advisor.calibration import Calibration, from_json, to_json
from polyphase.advisor.catalog import Library, accelerator_from_text, shipped_calibration, shipped_library
from polyphase.advisor.evaluation import errors, errors_by_group, predict
from polyphase.advisor.measurements import MeasuredTable, read_measurements
from polyphase.core.errors import ConfigurationError

_SHOWN = {
    "itl_median_pct": "ITL median",
    "itl_p90_pct": "p90",
    "tput_median_pct": "tok/s/acc. median",
    "ttft_median_pct": "TTFT median",
    "interval80_coverage_pct": "in the 80 % interval",
}


def read_text(file: Path, what: str) -> str:
    """Raises: ConfigurationError."""
    try:
        return file.read_text()
    except OSError as error:
        raise ConfigurationError(f"cannot read the {what} {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"the {what} {file} is not text in UTF-8") from None


def library_with(accelerator_files: Sequence[Path]) -> Library:
    """Raises: ConfigurationError."""
    library = shipped_library()
    for file in accelerator_files:
        library = library.with_accelerator(accelerator_from_text(read_text(file, "datasheet"), str(file)))
    return library


def calibration_of(file: Path | None) -> Calibration:
    """Raises: ConfigurationError."""
    return shipped_calibration() if file is None else from_json(read_text(file, "calibration"), str(file))


def read_table(file: Path, library: Library) -> MeasuredTable:
    """Raises: ConfigurationError if it holds no rows, or lacks columns."""
    rows = list(csv.DictReader(read_text(file, "table").splitlines()))
    if not rows:
        raise ConfigurationError(f"the table {file} holds no rows")
    return read_measurements(rows, library)


def calibrate_on(data: Path, out: Path, licence: str, accelerator_files: Sequence[Path], *, is_json: bool) -> None:
    """Raises: ConfigurationError."""
    table = read_table(data, library_with(accelerator_files))
    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        calibration, found = cross_validated(
            table.measurements, lambda what: progress.update(task, description=f"cross-validating: {what}")
        )
    figures = found.figures()
    calibration = _with_provenance(calibration, data, licence, table, figures)
    try:
        out.write_text(to_json(calibration))
    except OSError as error:
        raise ConfigurationError(f"cannot write the calibration {out}: {error.strerror}") from None
    names = {"configuration": "cv", "deployment": "deployment", "pair": "pair", "generation": "generation"}
    flat = {f"{names[way]}_{name}": value for way, values in figures.items() for name, value in values.items() if name != "count"}
    if is_json:
        print(json.dumps({"calibration": str(out), **_counts(table), **flat}))
        return
    console.print(_table_of("held out", figures))
    _print_skipped(console, table)
    console.print(f"wrote {out}, {out.stat().st_size // 1000} kB")


def _with_provenance(calibration: Calibration, data: Path, licence: str, table: MeasuredTable, figures: dict[str, Any]) -> Calibration:
    from dataclasses import replace

    provenance = {
        "polyphase": __version__,
        "table": data.name,
        "table_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "table_licence": licence,
        **_counts(table),
        "held_out_errors": figures,
    }
    return replace(calibration, provenance=provenance)


def _counts(table: MeasuredTable) -> dict[str, Any]:
    return {
        "rows_used": len(table.measurements),
        "rows_skipped": sum(table.skipped.values()),
        "skipped": dict(table.skipped.most_common()),
    }


def evaluate_on(data: Path, calibration_file: Path | None, accelerator_files: Sequence[Path], *, is_json: bool) -> None:
    """Raises: ConfigurationError."""
    table = read_table(data, library_with(accelerator_files))
    if not table.measurements:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in table.skipped.most_common(5))
        raise ConfigurationError(f"no row of {data} can be evaluated: {reasons}")
    calibration = calibration_of(calibration_file)
    predictions = predict(calibration, table.measurements)
    total, groups = errors(predictions), errors_by_group(predictions)
    if is_json:
        print(json.dumps({**total, **_counts(table), "total": total, "groups": groups}))
        return
    console = Console(highlight=False)
    console.print(_table_of("all", {"all": total}))
    for kind, members in groups.items():
        console.print(_table_of(kind, members))
    _print_skipped(console, table)
    if calibration.provenance.get("table_sha256") == hashlib.sha256(data.read_bytes()).hexdigest():
        console.print("[yellow]The coefficients were fitted on this very table: these are not errors on unseen measurements.[/]")


def _table_of(heading: str, members: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(heading, no_wrap=True)
    table.add_column("rows", justify="right")
    for name in _SHOWN.values():
        table.add_column(name, justify="right")
    for name, figures in members.items():
        table.add_row(name, str(int(figures["count"])), *(f"{figures[key]:.1f} %" for key in _SHOWN))
    return table


def _print_skipped(console: Console, table: MeasuredTable) -> None:
    for reason, count in table.skipped.most_common():
        console.print(f"skipped {count} rows: {reason}", style="dim", markup=False)


def show_known() -> None:
    library = shipped_library()
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("model", "parameters", "active", "published in"):
        table.add_column(heading, justify="right" if heading in ("parameters", "active") else "left")
    for shape in sorted(library.models.values(), key=lambda shape: shape.name):
        table.add_row(shape.name, f"{shape.parameter_count / 1e9:.1f}B", f"{shape.active_parameters / 1e9:.1f}B", shape.native_precision)
    console.print(table)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("accelerator", "memory", "bandwidth", "16 bit", "8 bit", "4 bit", "together"):
        table.add_column(heading, justify="left" if heading == "accelerator" else "right")
    for a in sorted(library.accelerators.values(), key=lambda a: a.name):
        peaks = (f"{flops / 1e12:.0f} TFLOP/s" for flops in a.flops_per_s.values())
        table.add_row(a.name, f"{a.memory_bytes / 1e9:.0f} GB", f"{a.memory_bytes_per_s / 1e12:.2f} TB/s", *peaks, str(a.domain_size))
    console.print(table)
