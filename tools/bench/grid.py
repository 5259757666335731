"""Tables as Markdown whose columns also line up in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]

    def drawn(cells: Sequence[str]) -> str:
        return "| " + " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return "\n".join([drawn(head), rule, *map(drawn, lines)])


def share(value: float) -> str:
    """0.125 as "12.5 %"."""
    return f"{100 * value:.1f} %"


def gigabytes(count: float) -> str:
    """Bytes as GB (2^30 bytes, as cards are sold) with two digits."""
    return f"{count / 2**30:.2f}"
