"""Rows of text as columns for a terminal, and as CSV that no spreadsheet takes for formulas."""

import csv
import io
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def csv_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as the content of a CSV file."""
    content = io.StringIO()
    csv.writer(content).writerows([_cell(text) for text in row] for row in rows)
    return content.getvalue()


def number(value: float, digits: int | None) -> str:
    """A number with `digits` behind the point, or with all that it has."""
    return repr(value) if digits is None else f"{value:.{digits}f}"


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: text that begins as one gets an apostrophe."""
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
