"""Show a run in wandb, swanlab or trackio: settings, every column of metrics.csv, samples and results.

metrics.csv has everything: if a package raises an error, a line says so and the run continues without it.
"""

import dataclasses
import importlib.util
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from support.common.errors import UserError, first_line
from support.common.files import read_json, write_whole
from support.compute import processes

PROJECT = "ppo-chinese-gpt2"  # unless WANDB_PROJECT, SWANLAB_PROJECT or TRACKIO_PROJECT is set


def check_installed(package: str) -> None:
    """Raise UserError if the package isn't installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a folder with that name, such as wandb's logs, has no origin
        raise UserError(f"--track {package} needs the package {package}: pip install {package}, or --track none")


class Tracker:
    """A run in a package ("none" for no package). tracking.json keeps its id there, so that --resume continues it."""

    def __init__(self, run_dir: Path, config: dict):
        self.package, self.module = config["track"], None
        if self.package != "none" and processes.rank() == 0:
            self.attempt(lambda: self.start(run_dir, config))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Report a run as failed unless `finish` has ended it. trackio has no such state."""
        why = first_line(error) if error else "stopped before its end"
        failed = {"wandb": {"exit_code": 1}, "swanlab": {"state": "crashed", "error": why}, "trackio": {}}
        self.end(**failed.get(self.package, {}))

    def start(self, run_dir: Path, config: dict) -> None:
        path = run_dir / "tracking.json"
        ids = read_json(path, "remove it; the run is then tracked as a new one", missing={})
        known = self.package in ids
        run_id = ids.setdefault(self.package, secrets.token_hex(8))
        name = run_dir.resolve().name
        options = {
            "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(run_dir)},
            "swanlab": {"experiment_name": name, "id": run_id, "resume": "allow", "logdir": str(run_dir / "swanlog")},
            # trackio takes no id and resumes the newest run with this name
            "trackio": {"name": f"{name}-{run_id[:6]}", "resume": "allow" if known else "never"},
        }
        project = os.environ.get(f"{self.package.upper()}_PROJECT", PROJECT)
        module = importlib.import_module(self.package)
        module.init(project=project, config=config, **options[self.package])
        self.module = module
        write_whole(path, json.dumps(ids) + "\n")

    def log(self, values: dict[str, float], samples: list[list] = (), step: int | None = None) -> None:
        """Log numbers by name, with a table of samples (prompt, completion, score) if there are any."""
        if self.module:
            self.attempt(lambda: self.module.log(values | self.table(samples), step=step))

    def finish(self, results: dict[str, float]) -> None:
        """Log the results of a finished run."""
        self.log(results)
        self.end()

    def end(self, **how) -> None:
        if self.module:
            self.attempt(lambda: self.module.finish(**how))
        self.module = None

    def table(self, samples: list[list]) -> dict:
        columns = ["prompt", "completion", "score"]
        if self.package == "swanlab" and samples:
            table = self.module.echarts.Table()
            table.add(columns, samples)
            return {"samples": table}
        return {"samples": self.module.Table(columns=columns, data=samples)} if samples else {}

    def attempt(self, call: Callable) -> None:
        """Call a package. If it raises, say so once and stop using it."""
        try:
            call()
        except Exception as error:
            self.module = None
            print(f"warning: {self.package} failed and is now off ({first_line(error)}); metrics.csv has everything")


def numbers(value, name: str) -> dict[str, float]:
    """Return the numbers in a JSON value or a dataclass, by their path; lists are left out."""
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    if isinstance(value, dict):
        return {path: x for key, part in value.items() for path, x in numbers(part, f"{name}/{key}").items()}
    return {name: value} if isinstance(value, (int, float)) else {}
