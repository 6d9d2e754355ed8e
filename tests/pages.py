"""The pages for readers, as the tests read them."""

import re
from pathlib import Path

from tests.conftest import ROOT


def read(page: str) -> str:
    """page: its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(page: str, language: str = r"\w+") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line)).lower().replace(" ", "-") for line in headings
    }


def links(page: Path) -> list[tuple[str, str]]:
    """(file, anchor) of the links within the repository, "" for this page or no anchor."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [tuple((link + "#").split("#")[:2]) for link in found if "://" not in link]
