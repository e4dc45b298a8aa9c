"""A scatter plot of text, for terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MARKS = "●○▲△■□◆◇"


def scatter(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, *, width: int, height: int) -> str:
    """`series`: by name, points (x, y), not negative. Both axes begin at zero. A later series is drawn over an earlier one."""
    points = [point for members in series.values() for point in members]
    if not points:
        return ""
    top_x, top_y = max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0
    margin = max(len(_short(top_y)), len(_short(0.0))) + 1
    columns = max(width - margin - 2, 10)
    field = [[" "] * columns for _ in range(height)]
    for mark, members in zip(_MARKS * (1 + len(series) // len(_MARKS)), series.values(), strict=False):
        for x, y in members:
            column = round(x / top_x * (columns - 1))
            row = height - 1 - round(y / top_y * (height - 1))
            field[row][column] = mark
    labels = {0: _short(top_y), height // 2: _short(top_y * (1 - height // 2 / (height - 1))), height - 1: "0"}
    lines = [y_name]
    lines += [f"{labels.get(number, ''):>{margin}}┤{''.join(row).rstrip()}" for number, row in enumerate(field)]
    lines.append(" " * margin + "└" + "─" * columns)
    right = f"{_short(top_x)} {x_name}"
    lines.append(" " * (margin + 1) + "0" + right.rjust(columns - 1))
    lines.append("  ".join(f"{mark} {name}" for mark, name in zip(_MARKS, series, strict=False)))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value / 1e3:.1f}k" if value >= 10_000 else f"{value:.0f}"
