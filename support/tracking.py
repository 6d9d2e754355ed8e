"""Show a run in wandb, swanlab or trackio: settings, every column of metrics.csv, samples and results.

metrics.csv stays the truth: if a package raises, one line says so and the run goes on without it.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from support.errors import UserError, first_line
from support.files import read_json, write_whole

PROJECT = "ppo-chinese-gpt2"  # unless WANDB_PROJECT, SWANLAB_PROJECT or TRACKIO_PROJECT names another


def check_installed(package: str) -> None:
    """Raise UserError if the package isn't installed. A folder of its name, as wandb leaves one, is not the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"--track {package} needs the package {package}: pip install {package}, or --track none")


class Tracker:
    """A run in a package ("none" for no package). tracking.json keeps its id there, with which --resume goes on."""

    def __init__(self, run_dir: Path, package: str, config: dict):
        self.package, self.module = package, None
        if package != "none":
            self.attempt(lambda: self.start(run_dir, config))

    def start(self, run_dir: Path, config: dict) -> None:
        path = run_dir / "tracking.json"
        ids = read_json(path, "remove it: the run is tracked anew", missing={})
        known = self.package in ids
        run_id = ids.setdefault(self.package, secrets.token_hex(8))
        options = {
            "wandb": {"name": run_dir.name, "id": run_id, "dir": str(run_dir), "resume": "allow"},
            "swanlab": {
                "experiment_name": run_dir.name, "id": run_id, "logdir": str(run_dir / "swanlog"), "resume": "allow",
            },
            "trackio": {"name": run_dir.name, "resume": "allow" if known else "never"},  # by its name: it takes no id
        }[self.package]  # fmt: skip
        project = os.environ.get(f"{self.package.upper()}_PROJECT", PROJECT)
        module = importlib.import_module(self.package)
        module.init(project=project, config=config, **options)
        self.module = module
        write_whole(path, json.dumps(ids) + "\n")

    def log(self, values: dict[str, float], samples: list[list] = (), step: int | None = None) -> None:
        """Log numbers by name, with a table of samples (prompt, completion, score) if there are any."""
        if self.module:
            self.attempt(lambda: self.module.log(values | (self.table(samples) if samples else {}), step=step))

    def table(self, samples: list[list]) -> dict:
        columns = ["prompt", "completion", "score"]
        if self.package != "swanlab":
            return {"samples": self.module.Table(columns=columns, data=samples)}
        table = self.module.echarts.Table()
        table.add(columns, samples)
        return {"samples": table}

    def finish(self) -> None:
        if self.module:
            self.attempt(self.module.finish)
        self.module = None

    def attempt(self, call: Callable) -> None:
        """Call a package. If it raises, say so once, and do without it from here on."""
        try:
            call()
        except Exception as error:
            self.module = None
            print(
                f"warning: {self.package} no longer tracks this run ({first_line(error)}); metrics.csv has everything"
            )


def numbers(value, name: str) -> dict[str, float]:
    """The numbers of a JSON value outside its lists, by their path."""
    if isinstance(value, dict):
        return {path: x for key, part in value.items() for path, x in numbers(part, f"{name}/{key}").items()}
    return {name: value} if isinstance(value, (int, float)) else {}
