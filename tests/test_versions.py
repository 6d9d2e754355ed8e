"""What is required, what is tested and what the READMEs say of both agree; and the tool that tries other versions."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT
from tools import versions


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
    assert all(version in required["transformers"].specifier for version in ("5.4.0", "5.24.0"))
    assert "5.3.0" not in required["transformers"].specifier  # loses the mask without a word


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_readme_names_the_lowest_versions_and_the_file_of_those_tested(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "constraints.txt" in text and "Python 3.10" in text
    for line in lines("requirements.txt").values():
        if line.name in ("torch", "transformers"):
            for limit in line.specifier:
                assert re.search(rf"\b{re.escape(limit.version)}\b", text)


@pytest.mark.parametrize("served", [True, False])
def test_a_row_of_the_table_says_what_was_measured_or_that_it_is_not_served(monkeypatch, capsys, tmp_path, served):
    said = {
        "pip": "ERROR: No matching distribution found for torch==2.6\n",
        "-c": "a warning\n3.11.7 2.6.0+cpu 5.4.0\n",
        "train_ppo.py": "",
        "pytest": "F..\n1 failed, 1011 passed, 2 warnings in 130.00s (0:02:10)\n",
    }
    asked = []

    def run(command, stdout, env, **options):
        (program,) = set(command) & set(said)
        asked.append((program, Path(env["PIP_CONSTRAINT"]).read_text().splitlines()))
        stdout.write(said[program] if program != "pip" or not served else "")
        if program == "train_ppo.py":
            folder = Path(command[command.index("--runs_dir") + 1], command[command.index("--run_name") + 1])
            folder.mkdir()
            (folder / "evaluation.json").write_text('{"gain": {"gain": 0.8234}}')
        return subprocess.CompletedProcess(command, {"pip": int(not served), "pytest": 1}.get(program, 0))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(versions.venv, "create", lambda folder, with_pip: None)
    assert versions.main([str(tmp_path), "lowest"]) == 1
    row = capsys.readouterr().out.splitlines()[-1]
    measured = "3.11.7 | 2.6.0+cpu | 5.4.0 | 1 failed, 1011 passed | 0.82"
    assert row == f"| lowest | {measured if served else 'not served: No matching distribution found for torch==2.6'} |"
    assert {"torch==2.6", "transformers==5.4", "numpy==1.26.4"} <= set(asked[0][1])
