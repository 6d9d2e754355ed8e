"""Format numbers, texts and tables for people."""

import math
import re
from unicodedata import east_asian_width

from support.common.errors import escaped


def decimals(spread: float, digits: int = 2) -> int:
    """Return how many decimals numbers with this standard deviation need: 2 for 0.38, none for 3,800."""
    return max(0, digits - 1 - math.floor(math.log10(spread))) if 0 < spread < math.inf else digits


def in_markdown(text: str) -> str:
    """Return a text on one line, escaped so that Markdown shows it as it is. The underscores of a_name need no \\."""
    return re.sub(r"([\\`*\[<|~&]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))", r"\\\1", escaped(" ".join(text.split())))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table of texts, escaped by `in_markdown`, with columns that line up in a terminal too."""

    def width(text: str) -> int:  # a Chinese character takes two columns
        return sum(1 + (east_asian_width(character) in "WF") for character in text)

    cells = [[in_markdown(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(width, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * each for each in widths])
    lines = [" | ".join(cell + " " * (each - width(cell)) for cell, each in zip(row, widths)) for row in cells]
    return "\n".join(f"| {line} |" for line in lines)
