"""The log of a run: metrics.csv with a row per step, samples.jsonl with a line per completion, and printed lines."""

import contextlib
import csv
import json
import os
from pathlib import Path

from tqdm import tqdm

from support.common.errors import UserError
from support.common.figures import decimals
from support.common.files import FIX_LINE, damaged, whole_lines, write_whole
from support.run.compare import read_rows


def step_row(step: int, seconds: dict[str, float], prompts: list[str], texts: list[str], scores, stats: dict) -> dict:
    """Return a step's row of metrics.csv. seconds: what each part of the step took. prompts, texts: of the batch.
    scores: (n,) float32."""
    scores = scores.double()  # the float32 mean of scores around a million is off by hundredths
    return {
        "step": step,
        "episodes": step * len(texts),
        "env/reward_mean": scores.mean().item(),
        "env/reward_std": scores.std(correction=0).item(),
        "env/reward_p10": scores.quantile(0.1).item(),
        "env/reward_p90": scores.quantile(0.9).item(),
        **stats,
        "tokens/unique_share": len(set(zip(prompts, texts))) / len(texts),
        **{f"time/{name}": value for name, value in seconds.items()},
        "time/step": sum(seconds.values()),
    }


def progress(row: dict, last_step: int) -> str:
    """Return the line that is printed after a step: how good the batch was, and how long the rest will take."""
    step, took = row["step"], row["time/step"]
    reward = f"{row['env/reward_mean']:.{decimals(row['env/reward_std']) + 1}f}"
    left = tqdm.format_interval((last_step - step) * took)
    return f"step {step}/{last_step}  reward {reward}  KL {row['objective/kl']:.2f}  {took:.2f} s per step, {left} left"


class RunLog:
    """Writes metrics.csv and samples.jsonl. Steps after `last_step` are removed first, since they are repeated. `rows`:
    the rows that are kept.

    Raises UserError, before the files change, if a line is damaged, other than an incomplete last line.
    """

    def __init__(self, run_dir: Path, last_step: int):
        metrics, samples = run_dir / "metrics.csv", run_dir / "samples.jsonl"
        rows = read_rows(metrics) if metrics.exists() else []
        logged_only = len(rows) > 1 and not (run_dir / "checkpoints").exists()
        if last_step == 0 and (logged_only or (run_dir / "model").exists()):
            raise UserError(f"{run_dir} has no checkpoint to continue from; start a new run under another --run_name")
        rows = [(line, row) for line, row in rows if row.get("step", 0) <= last_step]
        lines = []
        for number, line in enumerate(whole_lines(samples) if samples.exists() else [], 1):
            with damaged(f"line {number} of {samples}", FIX_LINE):
                if json.loads(line)["step"] <= last_step:
                    lines.append(line)
        self.rows = [row for _, row in rows[1:]]
        self.columns = list(self.rows[-1]) if self.rows else []
        write_whole(metrics, "".join(f"{line}\n" for line, _ in rows if self.rows))
        write_whole(samples, "".join(f"{line}\n" for line in lines))
        self.metrics, self.samples = (path.open("a", encoding="utf-8", newline="") for path in (metrics, samples))

    def write(self, row: dict, samples: list[dict]) -> None:
        """Append a row of metrics.csv, with the columns of the first, and lines of samples.jsonl."""
        if not self.columns:
            self.columns = list(row)
            csv.DictWriter(self.metrics, row).writeheader()
        csv.DictWriter(self.metrics, self.columns, restval="nan", extrasaction="ignore").writerow(row)
        self.samples.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self.samples.flush()
        self.metrics.flush()

    def sync(self) -> None:
        """Wait until everything is on disk."""
        for file in (self.metrics, self.samples):
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self.metrics, self.samples):
            with contextlib.suppress(OSError):  # the disk is full, and the run has ended because of it
                file.close()
