"""What is required, what is tested and what the READMEs say of both agree."""

import re

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT


def lines(name: str) -> dict[str, Requirement]:
    """A file of requirements, by the package's name."""
    return {(line := Requirement(text)).name: line for text in (ROOT / name).read_text().splitlines()}


def test_the_versions_tested_lie_in_the_ranges_required():
    required, tested = lines("requirements.txt"), lines("constraints.txt")
    assert list(tested) == list(required)
    for name, line in tested.items():
        (pin,) = line.specifier
        assert pin.operator == "==" and pin.version in required[name].specifier


def test_a_range_has_a_lowest_version_and_leaves_a_torch_that_is_there():
    required = lines("requirements.txt")
    assert all(">=" in str(line.specifier) for line in required.values())
    assert all(version in required["torch"].specifier for version in ("2.6.0", "2.7.1+cu128", "2.15.0+cpu"))
    assert "5.40.0" not in required["transformers"].specifier  # takes away `past_key_values`


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_readme_names_the_lowest_versions_and_the_file_of_those_tested(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "constraints.txt" in text and "Python 3.10" in text
    for line in lines("requirements.txt").values():
        if line.name in ("torch", "transformers"):
            for limit in line.specifier:
                assert re.search(rf"\b{re.escape(limit.version)}\b", text)
