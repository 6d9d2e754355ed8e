"""Numbers and texts for people."""

import math
import re

from support.errors import escaped


def decimals(spread: float, digits: int = 2) -> int:
    """With how many decimals numbers of this standard deviation are told apart: 2 with 0.38, none with 3,800."""
    return max(0, digits - 1 - math.floor(math.log10(spread))) if 0 < spread < math.inf else digits


def duration(seconds: float) -> str:
    """Seconds as "7 s", "5 min 46 s" or "2 h 5 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def in_markdown(text: str) -> str:
    """A text, on one line, as Markdown that shows it and nothing else: no markup, no HTML, no end of a table's cell."""
    return re.sub(r"([\\`*_\[<|~&])", r"\\\1", escaped(" ".join(text.split())))
