"""`polyphase router parts`: the parts that can be named in a configuration, ours and those of installed packages."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from polyphase.config.router import offered_parts
from polyphase.router import BUILT_IN, FILTERS, POLICIES


def show_parts() -> None:
    console = Console(highlight=False)
    scorers = _table("Scorers: reasons against a worker, weighed in tokens of prefill", "name", "one unit is", *POLICIES)
    for name, scorer in BUILT_IN.scorers.items():
        scorers.add_row(name, scorer.unit, *(_weight(weights.get(name)) for weights in POLICIES.values()))
    console.print(scorers, "")
    filters = _table("Filters of every policy, in this order", "name", "takes out workers that")
    for name in FILTERS:
        filters.add_row(name, ((type(BUILT_IN.filters[name]).__doc__ or "").splitlines() or [""])[0].rstrip("."))
    console.print(filters, "")
    pickers = _table("Pickers", "name", "")
    for name, make in BUILT_IN.pickers.items():
        pickers.add_row(name, ((make.__doc__ or "").splitlines() or [""])[0].rstrip("."))
    console.print(pickers)
    offered = list(offered_parts())
    if offered:
        others = _table("Of other packages", "name", "where", "package")
        for point in offered:
            taken = " (not used: the name is ours)" if _is_ours(point.name) else ""
            others.add_row(point.name, point.value + taken, point.dist.name if point.dist else "")
        console.print("", others)


def _is_ours(name: str) -> bool:
    return name in BUILT_IN.scorers or name in BUILT_IN.filters or name in BUILT_IN.pickers


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading)
    return table


def _weight(weight: float | None) -> str:
    return "-" if weight is None else f"{weight:g}"
