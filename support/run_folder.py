"""The folder of a run, and all that is written into it.

runs/<name>/
    config.json       the settings of the run
    inputs.json       hashes of models, prompts and your own reward's file, which --resume compares
    environment.jsonl one line per start: its command and first step, versions, device, dtype, processes
    metrics.csv       one row per step
    samples.jsonl     one line per completion
    evaluation.json   how good the policy was before and after, with all samples; without them, results.json
    inputs/           the file of your own reward and the prompts' file, as they were
    checkpoints/      see checkpoint.py
    error.log         the traceback of a reward function that failed, and its texts
    model/  rewards.png  report.md      what the end of a run writes
"""

import contextlib
import csv
import dataclasses
import json
import os
import shlex
import time
from pathlib import Path

from filelock import FileLock, Timeout

from config import PPOConfig
from plot_rewards import draw
from reward import RewardError
from support import evaluation, processes
from support.alarms import Alarms
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command_line import FINAL, new_run_folder
from support.compare import read_rows
from support.devices import environment
from support.errors import UserError, escaped
from support.evaluation import gibbs_policy, scores_and_prompts
from support.figures import decimals, duration
from support.files import MEND_LINE, damaged, disk_errors, read_json, remove, whole, whole_lines, write_whole
from support.load import hash_of, reward_file
from support.model_card import write_results
from support.prospect import prospect
from support.report import STARTS, read_starts, run_report
from support.settings import changes, save_config, total_steps
from support.tracking import Tracker, numbers


class RunFolder:
    """What a run reads from its folder and writes into it. Every process calls every method; only rank 0 writes.

    argv: this start's command line. inputs: what `load.input_hashes` returned.
    Raises UserError if the disk is full or something in the folder is damaged.
    """

    def __init__(self, path: Path, config: PPOConfig, argv: list[str], inputs: dict[str, str]):
        self.path, self.config, self.argv, self.inputs = path, config, argv, inputs
        self.writes = processes.rank() == 0
        self.lock = self.run_log = self.tracker = None
        self.saved_at = time.monotonic()

    def compare_inputs(self) -> None:
        """Raise UserError if the run has judged or trained a model with other models, prompts or reward than these."""
        path, judged = self.path / "inputs.json", self.path / "evaluation.json"
        before = processes.broadcast_from_rank_0(
            lambda: read_json(path, "remove it: it is made again", missing={}) if judged.exists() else {}
        )
        for name, now in self.inputs.items():
            # The demo's models are made anew, and may differ in the last digits on another machine
            if before.get(name, now) != now and not name.endswith("_name demo"):
                what = f"{name} is {now} and was {before[name]}"
                way = f"put it back, start a new run, or remove {path} to go on with what is there now"
                raise UserError(f"this is not what {self.path} was started with: {what}; {way}")

    def open(self, trainer, resume: bool) -> None:
        """Make the folder or, to resume, put its newest checkpoint into the trainer; start its log."""
        if not resume:
            self.path = processes.broadcast_from_rank_0(self.make)
            self.config.run_name = self.path.name
        processes.broadcast_from_rank_0(self.hold)
        if resume:
            self.compare_inputs()
            load_checkpoint(trainer, self.path / "checkpoints")
        processes.broadcast_from_rank_0(lambda: self.begin(trainer))
        if changed := [f"{name} {here} (preset: {preset})" for name, (preset, here) in changes(self.config).items()]:
            print(f"changed from the preset {self.config.preset}: {', '.join(changed)}")
        print(f"run folder {self.path}, {total_steps(self.config)} steps of {self.config.batch_size} completions")
        several = f"{processes.world_size()} processes, each " if processes.world_size() > 1 else ""
        print(f"{several}on {trainer.engine.device} in {str(trainer.engine.dtype)[6:]}")

    def make(self) -> Path:
        """Make the folder of a new run. Without --run_name, runs of the same second take different names."""
        path = new_run_folder(self.config) if self.path.exists() else self.path
        with disk_errors(path):
            path.mkdir(parents=True)
        return path

    def hold(self) -> None:
        """Lock the folder until this process ends. Raises UserError if another process has locked it."""
        self.lock = FileLock(self.path / ".lock")
        with disk_errors(self.path):
            try:
                self.lock.acquire(blocking=False)
            except Timeout:
                raise UserError(f"another process is at work in {self.path}; wait for it, or stop it")

    def begin(self, trainer) -> None:
        """Start the log, or go on with what was logged up to the trainer's step; write down the settings.

        Raises UserError, with all files as they were, if a log is damaged or the run has lost its checkpoints.
        """
        folder, metrics = self.path / "checkpoints", self.path / "metrics.csv"
        logged = metrics.exists() and metrics.read_bytes().count(b"\n") > 1
        if trainer.n_steps == 0 and ((self.path / "model").exists() or (logged and not folder.exists())):
            raise UserError(f"{folder} has no checkpoint to go on from; start a new run under another --run_name")
        with disk_errors(self.path):
            self.run_log = RunLog(self.path, trainer.n_steps)
            folder.mkdir(exist_ok=True)
            for leftover in [*self.path.glob(".partial-*"), *folder.glob(".partial-*")]:
                remove(leftover)  # of a kill
        self.note_start(trainer, trainer.n_steps + 1)
        write_whole(self.path / "inputs.json", json.dumps(self.inputs, ensure_ascii=False, indent=2) + "\n")
        for file in map(Path, filter(None, (reward_file(self.config), self.config.prompts_file))):
            content = file.read_bytes()
            with whole(self.path / "inputs" / f"{file.stem}-{hash_of(content)}{file.suffix}") as copied:
                copied.parent.mkdir(exist_ok=True)
                copied.write_bytes(content)
        save_config(self.config, self.path / "config.json")  # last: what has it can be resumed

    def note_start(self, trainer, step: int | None) -> None:
        """Add a line to environment.jsonl; step: the first of this start, or None if it judges a saved model."""
        if self.writes:
            start = {"command": escaped(shlex.join(["python", "train_ppo.py", *self.argv])), "step": step}
            start |= {"parameters": trainer.n_parameters, "parameters that train": trainer.n_trained}
            start |= environment(trainer.engine.device)
            start |= {"dtype": str(trainer.engine.dtype)[6:], "processes": processes.world_size()}
            starts = [*read_starts(self.path), start]
            write_whole(self.path / STARTS, "".join(json.dumps(each) + "\n" for each in starts))

    def expect(self, before: dict, prompts: list[str]) -> None:
        """Print what is possible from the evaluation before training, and prepare warnings and tracking."""
        kl_coef = self.config.init_kl_coef
        print("\n".join(prospect(before, prompts, kl_coef)))
        limit = gibbs_policy(*scores_and_prompts(before, prompts), kl_coef)["kl"] if kl_coef else None
        self.alarms = Alarms(self.config, limit)
        if self.writes:
            save_config(self.config, self.path / "config.json")  # with the coefficient that --kl_budget has found
            for row in self.run_log.rows:
                self.alarms.look(row)
            self.tracker = Tracker(self.path, self.config.track, dataclasses.asdict(self.config))

    def log(self, step: int, seconds: dict[str, float], prompts: list[str], completions: list[str], scores, stats):
        """Write a step's row of metrics.csv and its lines of samples.jsonl, and print how far the run is.

        seconds: what each part of the step took. prompts, completions: n texts. scores: (n,) float32.
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
            "tokens/unique_share": len(set(zip(prompts, completions))) / len(completions),
            **{f"time/{name}": value for name, value in seconds.items()},
            "time/step": sum(seconds.values()),
        }
        samples = [
            {"step": step, "prompt": prompt, "completion": completion, "score": score}
            for prompt, completion, score in zip(prompts, completions, scores.tolist())
        ]
        with disk_errors(self.path / "metrics.csv"):
            self.run_log.write(row, samples)
        digits, last, took = decimals(row["env/reward_std"]), total_steps(self.config), row["time/step"]
        figures = f"reward {row['env/reward_mean']:.{digits + 1}f}  KL {stats['objective/kl']:.2f}"
        print(f"step {step}/{last}  {figures}  {took:.2f} s a step, {duration((last - step) * took)} left")
        for alarm in self.alarms.look(row):
            print(f"warning: step {step}: {alarm['says']}")
        show = self.config.log_samples_every > 0 and step % self.config.log_samples_every == 0
        for sample in samples[: evaluation.SHOWN] if show else []:
            print(f"  {sample['score']:.{digits}f}  {sample['prompt']}{sample['completion']}")
        self.tracker.log(row, [list(sample.values())[1:] for sample in samples] if show else [], step)

    def checkpoint_due(self, step: int) -> bool:
        """After the last step, after every `save_every` steps, and when the last is `save_every_minutes` old."""
        every, minutes = self.config.save_every, self.config.save_every_minutes
        old = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return step == total_steps(self.config) or (every > 0 and step % every == 0) or old

    def save_checkpoint(self, trainer) -> None:
        if self.writes:
            with disk_errors(self.path):
                self.run_log.sync()  # a checkpoint counts on the log up to its step
            save_checkpoint(trainer, self.path / "checkpoints", self.config.keep_checkpoints)
        self.saved_at = time.monotonic()

    def save_model(self, trainer) -> None:
        """Replace model/ by the policy that training ended with."""
        if self.writes:
            with whole(self.path / "model") as partial:
                trainer.save(partial)

    def read_evaluation(self, prompts: list[str]) -> dict:
        """Read evaluation.json, {} if there is none yet."""
        return processes.broadcast_from_rank_0(lambda: evaluation.read(self.path, prompts))

    def write_evaluation(self, results: dict) -> None:
        if self.writes:
            evaluation.write_json(self.path / "evaluation.json", results)

    def report(self, results: dict, prompts: list[str]) -> None:
        """Compute the gain and the verdict, print completions and figures."""
        if self.writes:
            evaluation.add_yardsticks(results, prompts, self.config.init_kl_coef)
            results["verdict"] = evaluation.verdict(results, self.config)
            tables = evaluation.before_after_table(results), evaluation.results_table(results)
            print("", *tables, results["verdict"], sep="\n\n")

    def finish(self, results: dict, prompts: list[str]) -> None:
        """Write evaluation.json, results.json, the picture, and report.md."""
        if self.writes:
            with disk_errors(self.path / FINAL[-1]):
                (self.path / FINAL[-1]).unlink(missing_ok=True)  # until it belongs to what is written here
            self.write_evaluation(results)
            evaluation.write_json(self.path / "results.json", evaluation.without_samples(results))
            if (self.path / "metrics.csv").exists():
                draw([self.path], self.path / "rewards.png")
            figures, texts = evaluation.results_table(results), evaluation.before_after_table(results)
            judgement = f"**{results['verdict']}**\n\n{figures}\n\nThe same draws before and after:\n\n{texts}"
            write_results(self.path / "model", self.config, prompts, judgement)
            write_whole(self.path / FINAL[-1], run_report(self.path, results, self.inputs, read_starts(self.path)))
            print(f"\nmodel, metrics and report.md are in {self.path}")
            if self.tracker:
                self.tracker.log(numbers(results, "evaluation"))

    def close(self) -> None:
        """Finish the tracked run, close the log and unlock the folder."""
        if self.tracker:
            self.tracker.finish()
        if self.run_log:
            self.run_log.close()
        if self.lock:
            self.lock.release()

    @contextlib.contextmanager
    def errors_explained(self, trainer, training: bool = False):
        """Raise UserError if a reward or a step fails. Keep a reward's traceback and, in training, a checkpoint."""
        where = "evaluation"
        try:
            yield
        except RewardError as error:
            if training:
                where = f"step {trainer.n_steps + 1}"
                self.save_checkpoint(trainer)
            if self.writes and error.traceback:
                write_whole(self.path / "error.log", error.traceback)
            log = f"; the traceback and the texts are in {self.path / 'error.log'}" if error.traceback else ""
            raise UserError(f"{where}: {error}{log}")
        except FloatingPointError as error:
            hint = "try a lower --lr, or --dtype float32. The last good checkpoint is kept"
            raise UserError(f"step {trainer.n_steps + 1}: {error}; {hint}")


class RunLog:
    """metrics.csv and samples.jsonl, without the steps after `last_step`, which are made again.

    Raises UserError, with the files as they were, if a line other than a last one that was cut short is damaged.
    """

    def __init__(self, run_dir: Path, last_step: int):
        metrics, samples = run_dir / "metrics.csv", run_dir / "samples.jsonl"
        rows = read_rows(metrics) if metrics.exists() else []
        rows = [(line, row) for line, row in rows if row.get("step", 0) <= last_step]
        lines = []
        for number, line in enumerate(whole_lines(samples) if samples.exists() else [], 1):
            with damaged(f"line {number} of {samples}", MEND_LINE):
                if json.loads(line)["step"] <= last_step:
                    lines.append(line)
        self.rows = [row for _, row in rows[1:]]
        self.columns = list(self.rows[-1]) if self.rows else []
        write_whole(metrics, "".join(f"{line}\n" for line, _ in rows if self.rows))
        write_whole(samples, "".join(f"{line}\n" for line in lines))
        self.metrics, self.samples = (path.open("a", encoding="utf-8", newline="") for path in (metrics, samples))

    def write(self, row: dict, samples: list[dict]) -> None:
        if not self.columns:
            self.columns = list(row)
            csv.DictWriter(self.metrics, row).writeheader()
        csv.DictWriter(self.metrics, self.columns, restval="nan", extrasaction="ignore").writerow(row)
        self.samples.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self.samples.flush()
        self.metrics.flush()

    def sync(self) -> None:
        for file in (self.metrics, self.samples):
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self.metrics, self.samples):
            with contextlib.suppress(OSError):  # a full disk, which has ended the run
                file.close()
