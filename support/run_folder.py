"""The folder of a run, and all that is written into it.

runs/<name>/
    config.json       the settings that the run was started with
    changes.json      where these differ from the preset as published: [published, here]
    metrics.csv       one row a step
    samples.jsonl     one line a completion
    evaluation.json   how good the policy was before and after
    checkpoints/      see checkpoint.py
    error.log         the traceback of a reward function that failed, and its texts
    model/  rewards.png  before_after.md      what the end of a run writes
"""

import contextlib
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from config import PPOConfig
from plot_rewards import draw, read_rows
from reward import RewardError
from support import collectives, evaluation, meeting
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command_line import FINAL, JOB_FILE, new_run_folder
from support.errors import UserError
from support.reading import MEND_LINE, parse_json, whole_lines
from support.settings import changes, describe_changes, save_config, total_steps
from support.writing import disk_errors, whole, write_whole


class RunFolder:
    """What a run reads from its folder and writes into it.

    Every process calls every method: those that read do it for all, those that write do it on rank 0 alone and are
    silent on the others. UserError where the disk or the folder does not allow it.
    """

    def __init__(self, path: Path, config: PPOConfig):
        self.path = path
        self.config = config
        self.writes = collectives.rank() == 0

    def open(self, trainer, resume: bool) -> None:
        """Make the folder or, to resume, put its newest checkpoint into the trainer; start its log."""
        if not resume:
            collectives.broadcast_from_rank_0(self.make)
        self.hold()
        if resume:
            load_checkpoint(trainer, self.path / "checkpoints")
        if self.writes:
            self.run_log = RunLog(self.path, trainer.n_steps)
            if meeting.job():
                write_whole(self.path / JOB_FILE, meeting.job())
            save_config(self.config, self.path / "config.json")
            write_whole(self.path / "changes.json", json.dumps(changes(self.config), ensure_ascii=False) + "\n")
        self.saved_at = time.monotonic()
        for line in describe_changes(self.config):
            print(line)
        print(f"run folder {self.path}, {total_steps(self.config)} steps of {self.config.batch_size} completions")
        several = f"{collectives.world_size()} processes, each " if collectives.world_size() > 1 else ""
        print(f"{several}on {trainer.engine.device} in {str(trainer.engine.dtype)[6:]}")

    def make(self) -> None:
        """Make the folder of a new run; one that has no name of its own gives way to another of the same second."""
        with disk_errors(self.path):
            while True:
                try:
                    self.path.mkdir(parents=True, exist_ok=meeting.restart_count() > 0)
                    break
                except FileExistsError:  # since the command line was read
                    if self.config.run_name is not None or meeting.below_torchrun():
                        raise
                    self.path = new_run_folder(self.config)
        self.config.run_name = self.path.name

    def hold(self) -> None:
        """Lock the folder for this process, however it dies. UserError, on all, where another holds it."""

        def lock() -> None:
            self.lock = FileLock(self.path / ".lock")
            with disk_errors(self.path):
                try:
                    self.lock.acquire(blocking=False)
                except Timeout:
                    raise UserError(f"another process is at work in {self.path}; wait for it, or stop it")

        collectives.broadcast_from_rank_0(lock)

    def steps(self, trainer) -> Iterator[int]:
        """The numbers of the steps still to do, from 1, with a progress bar."""
        first, last = trainer.n_steps + 1, total_steps(self.config)
        with tqdm(
            range(first, last + 1), initial=first - 1, total=last, unit="step", disable=not self.writes
        ) as self.bar:
            yield from self.bar

    def log(self, step: int, seconds: dict[str, float], prompts: list[str], completions: list[str], scores, stats):
        """A step's row of metrics.csv and its lines of samples.jsonl; now and then a few completions on the screen.

        seconds: what each part of the step took. prompts, completions (n texts) and scores (n,) belong together.
        """
        if not self.writes:
            return
        row = {
            "step": step,
            "episodes": step * self.config.batch_size,
            "env/reward_mean": scores.mean().item(),
            "env/reward_std": scores.std(correction=0).item(),
            "env/reward_p10": scores.quantile(0.1).item(),
            "env/reward_p90": scores.quantile(0.9).item(),
            **stats,
            **{f"time/{name}": value for name, value in seconds.items()},
            "time/step": sum(seconds.values()),
        }
        samples = [
            {"step": step, "prompt": prompt, "completion": completion, "score": score}
            for prompt, completion, score in zip(prompts, completions, scores.tolist())
        ]
        with disk_errors(self.path / "metrics.csv"):
            self.run_log.write(row, samples)
        self.bar.set_postfix(reward=f"{row['env/reward_mean']:.3f}", kl=f"{stats['objective/kl']:.2f}")
        if self.config.log_samples_every and step % self.config.log_samples_every == 0:
            shown = [f"  {s['score']:.2f}  {s['prompt']}{s['completion']}" for s in samples[: evaluation.SHOWN]]
            tqdm.write("\n".join([f"step {step}, mean reward {row['env/reward_mean']:.3f}", *shown]))

    def checkpoint_due(self, step: int) -> bool:
        """After the last step, after every `save_every` steps, and when the last is `save_every_minutes` old."""
        every, minutes = self.config.save_every, self.config.save_every_minutes
        old = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return step == total_steps(self.config) or (every > 0 and step % every == 0) or old

    def save_checkpoint(self, trainer) -> None:
        if self.writes:
            save_checkpoint(trainer, self.path / "checkpoints", self.config.keep_checkpoints)
        self.saved_at = time.monotonic()

    def save_model(self, trainer) -> None:
        """Replace model/ by the policy that training ended with."""
        if self.writes:
            with whole(self.path / "model", 4 * trainer.model.num_parameters()) as partial:
                trainer.save(partial)

    def read_evaluation(self, prompts: list[str]) -> dict:
        """evaluation.json, or nothing where there is none yet."""
        return collectives.broadcast_from_rank_0(lambda: evaluation.read(self.path, prompts))

    def write_evaluation(self, results: dict) -> None:
        if self.writes:
            evaluation.write_json(self.path / "evaluation.json", results)

    def report(self, results: dict, prompts: list[str]) -> None:
        """Work out the gain, print the table."""
        if self.writes:
            evaluation.add_yardsticks(results, prompts, self.config.init_kl_coef)
            print(f"\n{evaluation.commonest(results)}\n\n{evaluation.summary(results)}")

    def finish(self, results: dict) -> None:
        """Write evaluation.json, the pictures, and the table of completions before and after."""
        if self.writes:
            (self.path / FINAL[-1]).unlink(missing_ok=True)  # until it belongs to what is written here
            self.write_evaluation(results)
            if (self.path / "metrics.csv").exists():
                draw([self.path], self.path / "rewards.png")
            table = evaluation.before_after_table(results)
            write_whole(self.path / "before_after.md", table + "\n")
            print(f"\n{table}\n\nmodel, metrics and pictures are in {self.path}")

    @contextlib.contextmanager
    def errors_explained(self, trainer, training: bool = False):
        """Say where a reward or a step failed. A reward's traceback goes to error.log; training keeps a checkpoint."""
        try:
            yield
        except RewardError as error:
            where = f"step {trainer.n_steps + 1}" if training else "evaluation"
            if training:
                self.save_checkpoint(trainer)
            if not error.traceback:
                raise UserError(f"{where}: {error}")
            if self.writes:
                write_whole(self.path / "error.log", error.traceback)
            raise UserError(f"{where}: {error}; the traceback and the texts are in {self.path / 'error.log'}")
        except FloatingPointError as error:
            hint = "try a lower --lr, or --dtype float32. The last good checkpoint is kept"
            raise UserError(f"step {trainer.n_steps + 1}: {error}; {hint}")


class RunLog:
    """metrics.csv, one row a step, and samples.jsonl, one line a completion; both flushed at every step."""

    def __init__(self, run_dir: Path, last_step: int):
        self.run_dir = run_dir
        self.drop_after(last_step)
        self.metrics = (run_dir / "metrics.csv").open("a", encoding="utf-8", newline="")
        self.samples = (run_dir / "samples.jsonl").open("a", encoding="utf-8")

    def drop_after(self, last_step: int) -> None:
        """Remove what was logged after the checkpoint that the run goes on from, and a line that is not whole.

        UserError, with both files as they were, where a line of one is damaged.
        """
        steps_of_lines = {
            "metrics.csv": lambda path: [(line, row.get("step", 0)) for line, row in read_rows(path)],
            "samples.jsonl": lambda path: [
                (line, parse_json(line, {"step": int}, f"line {number} of {path}", MEND_LINE)["step"])
                for number, line in enumerate(whole_lines(path), 1)
            ],
        }
        paths = [self.run_dir / name for name in steps_of_lines if (self.run_dir / name).exists()]
        for path, lines in [(path, steps_of_lines[path.name](path)) for path in paths]:
            write_whole(path, "".join(f"{line}\n" for line, step in lines if step <= last_step))

    def write(self, row: dict, samples: list[dict]) -> None:
        writer = csv.DictWriter(self.metrics, row.keys())
        if self.metrics.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        self.samples.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self.metrics.flush()
        self.samples.flush()
