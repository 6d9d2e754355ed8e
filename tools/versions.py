"""The demo and the tests with other versions of the libraries: what README.md's table of versions says.

    python -m tools.versions FOLDER [ROW ...]

Each row has an environment of its own in FOLDER, of the Python that runs this, which is made or brought up to date (up
to 6 GB: torch comes with CUDA). What pip, the demo and the tests said stays there too. Prints a row as soon as it is
known. The exit code is 1 where versions are not served, or the demo or a test failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {  # what pip is held to, beside requirements.txt
    "lowest": re.sub(r">=([^,\n]+).*", r"==\1", (ROOT / "requirements.txt").read_text()),
    "middle": "torch==2.9.1\ntransformers==5.14.1\n",
    "tested": (ROOT / "constraints.txt").read_text(),
    "newest": "# whatever is served\n",
}
COLUMNS = ["versions", "Python", "torch", "transformers", "tests", "gain of the demo"]
NAMES = """from platform import python_version; import torch, transformers
print(python_version(), torch.__version__, transformers.__version__)"""


def measure(name: str, folder: Path) -> tuple[list[str], bool]:
    """The cells of a row, and whether all is well there."""
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    pins = folder / "constraints.txt"
    pins.write_text(ROWS[name])
    # A variable, which takes the place of what this machine's pip is held to; -c would come on top
    environment = os.environ | {"PIP_CONSTRAINT": str(pins)}

    def ran(log: str, *command) -> tuple[bool, str]:
        """Whether a command of this environment's python succeeded, and what it said, which stays in a file."""
        with (folder / log).open("w+", encoding="utf-8") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            done = subprocess.run([python, *map(str, command)], cwd=ROOT, env=environment, **streams)
            file.seek(0)
            return done.returncode == 0, file.read()

    installed, said = ran("pip.log", "-m", "pip", "install", "-q", "--upgrade", "-r", "requirements.txt")
    if not installed:
        errors = re.findall("ERROR: (.*)", said) or ["pip failed"]
        return [name, f"not served: {errors[0]}"], False
    versions = ran("versions.log", "-c", NAMES)[1].split()[-3:]
    flags = ["--preset", "demo", "--runs_dir", folder, "--run_name", f"demo-{os.getpid()}"]
    demo, _ = ran("demo.log", "train_ppo.py", *flags)
    gain = "failed"
    if demo:
        results = json.loads((folder / flags[-1] / "evaluation.json").read_text(encoding="utf-8"))
        gain = f"{results['gain']['gain']:.2f}"
    tests, said = ran("tests.log", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", said.splitlines()[-1])
    return [name, *versions, ", ".join(counts) or "did not end", gain], demo and tests


def main(argv: list[str]) -> int:
    """Run the program; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the environments, which stay")
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all unless given")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row {' '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|", flush=True)
    well = True
    for name in args.rows or ROWS:
        cells, good = measure(name, args.folder.absolute() / name)
        print(f"| {' | '.join(cells)} |", flush=True)
        well &= good
    return int(not well)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
