"""The folder of a run, and all that is written into it.

runs/<name>/
    config.json       the settings that the run was started with
    changes.json      those that differ from the preset: [its value, this run's]
    inputs.json       hashes of the models, the prompts, the file of a reward of one's own, which --resume compares
    inputs/           that file and the prompts' file, as they were
    environment.jsonl one line a start: its command and first step, parameters, versions, device, dtype, processes
    metrics.csv       one row a step
    samples.jsonl     one line a completion
    evaluation.json   how good the policy was before and after, with all samples; without them, results.json
    checkpoints/      see checkpoint.py
    tracking.json  tracking.log               of --track, see tracking.py
    error.log         the traceback of a reward function that failed, and its texts
    model/  rewards.png  report.md      what the end of a run writes
"""

import contextlib
import csv
import json
import math
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from config import PPOConfig
from plot_rewards import draw
from reward import RewardError
from support import collectives, evaluation, meeting, tracking
from support.alarms import Alarms
from support.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from support.command_line import FINAL, flags_to_go_on, new_run_folder
from support.compare import read_rows
from support.devices import environment
from support.errors import FolderGone, UserError, escaped
from support.evaluation import gibbs_policy, scores_and_prompts
from support.figures import decimals, duration
from support.files import MEND_LINE, damaged, disk_errors, read_json, remove, whole, whole_lines, write_whole
from support.load import hash_of, own_files
from support.model_card import write_results
from support.prospect import prospect
from support.report import STARTS, read_starts, run_report
from support.settings import changes, describe_changes, save_config, total_steps

INPUTS = "inputs.json"
TELL_EVERY = 10  # seconds


class RunFolder:
    """What a run reads from its folder and writes into it.

    Every process calls every method: those that read do it for all, those that write do it on rank 0 alone and are
    silent on the others. UserError where the disk or the folder does not allow it.
    """

    def __init__(self, path: Path, config: PPOConfig):
        self.path = path
        self.config = config
        self.writes = collectives.rank() == 0
        self.inputs = {}  # what `input_hashes` gave
        self.argv, self.starts = [], []  # of this start; lines of environment.jsonl

    def compare_inputs(self) -> None:
        """UserError where the run has judged or trained a model with other models, prompts or reward than these."""
        path = self.path / INPUTS

        def those_used() -> dict:
            results = (self.path / "evaluation.json", self.path / "model", *checkpoints(self.path / "checkpoints"))
            used = path.exists() and any(result.exists() for result in results)
            return read_json(path, "remove it: it is made again") if used else {}

        before = collectives.broadcast_from_rank_0(those_used)
        # The demo's models are made anew, and on another machine may differ in the last digits
        now = {name: value for name, value in self.inputs.items() if not name.endswith("_name demo")}
        other = [name for name in now if before.get(name, now[name]) != now[name]]
        if other:
            what = "; ".join(f"{name} is {now[name]} and was {before[name]}" for name in other)
            way = f"put back what it was, start a new run, or remove {path} to go on with what is there now"
            raise UserError(f"this is not what {self.path} was started with: {what}; {way}")

    def open(self, trainer, resume: bool) -> None:
        """Make the folder or, to resume, put its newest checkpoint into the trainer; start its log."""
        self.resumed = resume
        if not resume:
            collectives.broadcast_from_rank_0(self.make)
        self.hold()
        if resume:
            self.compare_inputs()
            load_checkpoint(trainer, self.path / "checkpoints")
        collectives.broadcast_from_rank_0(lambda: self.begin(trainer))
        if resume and trainer.n_steps == 0:
            print(f"no checkpoint in {self.path / 'checkpoints'} yet: the run starts from the beginning")
        self.saved_at = time.monotonic()
        if changed := describe_changes(self.config):
            print(changed)
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
        """Lock the folder for this process, however it dies, and read of its earlier starts. UserError, on all, where
        another process holds it."""

        def lock() -> None:
            self.lock = FileLock(self.path / ".lock")
            with disk_errors(self.path):
                try:
                    self.lock.acquire(blocking=False)
                except Timeout:
                    raise UserError(f"another process is at work in {self.path}; wait for it, or stop it")
            self.starts = read_starts(self.path)

        collectives.broadcast_from_rank_0(lock)

    def begin(self, trainer) -> None:
        """Start the log, or go on with what was logged up to the trainer's step; write down the settings.

        UserError, with all files as they were, where a log is damaged, or where a run that has lost its checkpoints
        would begin again over more than what it logged before the first of them.
        """
        folder, metrics = self.path / "checkpoints", self.path / "metrics.csv"
        logged = metrics.exists() and metrics.read_bytes().count(b"\n") > 1
        if trainer.n_steps == 0 and ((self.path / "model").exists() or (logged and not folder.exists())):
            lost = f"{folder} holds no checkpoint to go on from, and step 1 would replace the logs and the model"
            raise UserError(f"{lost} in {self.path}; start a new run under another --run_name")
        with disk_errors(self.path):
            self.run_log = RunLog(self.path, trainer.n_steps)
            folder.mkdir(exist_ok=True)
            for leftover in [*self.path.glob(".partial-*"), *folder.glob(".partial-*")]:
                remove(leftover)  # of a kill
            self.trainer, self.inode = trainer, self.path.stat().st_ino  # for look_for_folder
        self.write_settings()

    @contextlib.contextmanager
    def given_up_on_error(self):
        """Where what stands inside is refused, before any step of a new run, its folder goes and its name is free."""
        try:
            yield
        except UserError:
            if self.writes and not self.resumed:
                self.run_log.close()
                self.lock.release()
                remove(self.path)
            raise

    def expect(self, before: dict, prompts: list[str]) -> None:
        """Say what is possible, by how the policy before training was judged, and look out for signs of a sick run."""
        collectives.broadcast_from_rank_0(self.write_config)  # where --kl_budget has found the coefficient
        kl_coef = self.config.init_kl_coef
        print("\n".join(prospect(before, prompts, kl_coef)))
        limit = gibbs_policy(*scores_and_prompts(before, prompts), kl_coef)["kl"] if kl_coef else None
        self.alarms = Alarms(self.config, limit)
        for row in self.run_log.rows if self.writes else []:
            self.alarms.look(row)

    def track(self) -> None:
        """Have the run followed by another package, from a process of its own."""
        if self.writes and self.config.track != "none":
            tracking.start(self.path, self.config.track)

    def write_config(self) -> None:
        save_config(self.config, self.path / "config.json")
        write_whole(self.path / "changes.json", json.dumps(changes(self.config), ensure_ascii=False) + "\n")

    def write_settings(self) -> None:
        """What decides the run: settings, hashes of what was loaded, the user's own files as they are now, and what
        computes from here on."""
        self.write_config()
        self.note_start(self.trainer, self.trainer.n_steps + 1)
        write_whole(self.path / INPUTS, json.dumps(self.inputs, ensure_ascii=False, indent=2) + "\n")
        for file in own_files(self.config):
            with disk_errors(self.path):
                (self.path / "inputs").mkdir(exist_ok=True)
                content = file.read_bytes()
            with whole(self.path / "inputs" / f"{file.stem}-{hash_of(content)}{file.suffix}") as partial:
                partial.write_bytes(content)

    def note_start(self, trainer, step: int | None) -> None:
        """A line of environment.jsonl for this start; step: its first, or None where it judges a saved model."""
        if self.writes:
            start = {"command": escaped(shlex.join(["python", "train_ppo.py", *self.argv])), "step": step}
            start |= {"parameters": trainer.n_parameters, "parameters that train": trainer.n_trained}
            start |= environment(trainer.engine.device)
            self.starts.append(start | {"dtype": str(trainer.engine.dtype)[6:], "processes": collectives.world_size()})
            write_whole(self.path / STARTS, "".join(json.dumps(each) + "\n" for each in self.starts))

    def steps(self, trainer) -> Iterator[int]:
        """The numbers of the steps still to do, from 1, with a progress bar; without a terminal `log` says how far."""
        first, last = trainer.n_steps + 1, total_steps(self.config)
        self.first, self.begun, self.told_at = first, time.monotonic(), -math.inf
        without = None if self.writes else True  # tqdm's word for "where stderr is no terminal"
        with tqdm(range(first, last + 1), initial=first - 1, total=last, unit="step", disable=without) as self.bar:
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
            "tokens/unique_share": len(set(zip(prompts, completions))) / len(completions),
            **{f"time/{name}": value for name, value in seconds.items()},
            "time/step": sum(seconds.values()),
        }
        samples = [
            {"step": step, "prompt": prompt, "completion": completion, "score": score}
            for prompt, completion, score in zip(prompts, completions, scores.tolist())
        ]
        self.look_for_folder()
        with disk_errors(self.path / "metrics.csv"):
            self.run_log.write(row, samples)
        tracking.look()
        for alarm in self.alarms.look(row):
            tqdm.write(f"warning: step {step}: {alarm['says']}")
        digits = decimals(row["env/reward_std"])
        mean = f"{row['env/reward_mean']:.{digits + 1}f}"
        self.bar.set_postfix(reward=mean, kl=f"{stats['objective/kl']:.2f}")
        if self.bar.disable:
            self.tell(step, f"reward {mean}  KL {stats['objective/kl']:.2f}")
        if self.config.log_samples_every and step % self.config.log_samples_every == 0:
            shown = [f"  {s['score']:.{digits}f}  {s['prompt']}{s['completion']}" for s in samples[: evaluation.SHOWN]]
            tqdm.write("\n".join([f"step {step}, mean reward {mean}", *shown]))

    def tell(self, step: int, figures: str) -> None:
        """A line on how far the run is, where no bar shows it: of the first step and the last, and every TELL_EVERY
        seconds between them."""
        now, last = time.monotonic(), total_steps(self.config)
        if now - self.told_at >= TELL_EVERY or step == last:
            self.told_at = now
            each = (now - self.begun) / (step - self.first + 1)
            print(f"step {step}/{last}  {figures}  {each:.2f} s a step, {duration((last - step) * each)} left")

    def checkpoint_due(self, step: int) -> bool:
        """After the last step, after every `save_every` steps, and when the last is `save_every_minutes` old."""
        every, minutes = self.config.save_every, self.config.save_every_minutes
        old = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return step == total_steps(self.config) or (every > 0 and step % every == 0) or old

    def save_checkpoint(self, trainer) -> None:
        if self.writes:
            self.look_for_folder()
            with disk_errors(self.path):
                self.run_log.sync()
            save_checkpoint(trainer, self.path / "checkpoints", self.config.keep_checkpoints)
        self.saved_at = time.monotonic()

    def look_for_folder(self) -> None:
        """Where this is no more the folder that was opened, the state goes into a new one beside it; FolderGone."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self.inode:
                return
        lost, self.path = self.path, self.path.with_name(f"{self.path.name}-step-{self.trainer.n_steps}")
        with disk_errors(self.path):
            self.path.mkdir(parents=True)
        self.write_settings()
        save_checkpoint(self.trainer, self.path / "checkpoints", keep=1)
        gone = f"{lost} was removed or renamed while the run was at work there"
        flags = flags_to_go_on(self.path, self.config)
        raise FolderGone(f"{gone}; what it needs to go on is in {self.path}: python train_ppo.py {flags}")

    def save_model(self, trainer) -> None:
        """Replace model/ by the policy that training ended with."""
        if self.writes:
            with whole(self.path / "model") as partial:
                trainer.save(partial)

    def read_evaluation(self, prompts: list[str]) -> dict:
        """evaluation.json, or nothing where there is none yet."""
        return collectives.broadcast_from_rank_0(lambda: evaluation.read(self.path, prompts))

    def write_evaluation(self, results: dict) -> None:
        if self.writes:
            evaluation.write_json(self.path / "evaluation.json", results)

    def report(self, results: dict, prompts: list[str]) -> None:
        """Work out the gain and the verdict, print completions and figures."""
        if self.writes:
            evaluation.add_yardsticks(results, prompts, self.config.init_kl_coef)
            results["verdict"] = evaluation.verdict(results, self.config)
            tables = evaluation.before_after_table(results), evaluation.results_table(results)
            print("", *tables, results["verdict"], sep="\n\n")

    def finish(self, results: dict) -> None:
        """Write evaluation.json, results.json, the picture, and report.md."""
        if self.writes:
            with disk_errors(self.path / FINAL[-1]):
                (self.path / FINAL[-1]).unlink(missing_ok=True)  # until it belongs to what is written here
            self.write_evaluation(results)
            evaluation.write_json(self.path / "results.json", evaluation.without_samples(results))
            if (self.path / "metrics.csv").exists():
                draw([self.path], self.path / "rewards.png")
            prompts = list(dict.fromkeys(prompt for prompt, *_ in results["before"]["samples"]))
            figures, texts = evaluation.results_table(results), evaluation.before_after_table(results)
            judgement = f"**{results['verdict']}**\n\n{figures}\n\nThe same draws before and after:\n\n{texts}"
            write_results(self.path / "model", self.config, prompts, judgement)
            write_whole(self.path / FINAL[-1], run_report(self.path, results, self.inputs, self.starts))
            remove(self.path / "before_after.md")  # of an earlier version, and of an earlier model
            print(f"\nmodel, metrics and report.md are in {self.path}")

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
    """metrics.csv, one row a step, and samples.jsonl, one line a completion; both reach the system at every step.

    Of what is there, the steps after `last_step` are dropped, and a last line that is not whole: they are made again.
    UserError, with the files as they were, where another line is damaged.
    """

    def __init__(self, run_dir: Path, last_step: int):
        self.path, samples = run_dir / "metrics.csv", run_dir / "samples.jsonl"
        rows = (
            [(line, row) for line, row in read_rows(self.path) if row.get("step", 0) <= last_step]
            if self.path.exists()
            else []
        )
        lines = []
        for number, line in enumerate(whole_lines(samples) if samples.exists() else [], 1):
            with damaged(f"line {number} of {samples}", MEND_LINE):
                lines.append((line, int(json.loads(line)["step"])))
        self.lines, self.rows = [line for line, _ in rows], [row for _, row in rows[1:]]
        self.columns = list(rows[-1][1]) if rows else []
        write_whole(self.path, "".join(f"{line}\n" for line in self.lines))
        write_whole(samples, "".join(f"{line}\n" for line, step in lines if step <= last_step))
        if last_step > (logged := int(rows[-1][1].get("step", 0)) if rows else 0):
            print(f"warning: {self.path} ends with step {logged}; the steps up to {last_step} are lost from it")
        self.metrics = self.path.open("a", encoding="utf-8", newline="")
        self.samples = samples.open("a", encoding="utf-8", newline="")

    def write(self, row: dict, samples: list[dict]) -> None:
        if new := [name for name in row if name not in self.columns]:
            self.add_columns(new)
        csv.DictWriter(self.metrics, self.columns, restval="nan").writerow(row)
        self.samples.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self.samples.flush()
        self.metrics.flush()  # last: a step whose row is there has its samples there

    def add_columns(self, new: list[str]) -> None:
        """The header of a new table; or, of one that an earlier version of this program began, more columns, of nan."""
        self.columns += new
        table = [",".join(self.columns), *(line.rstrip("\r") + ",nan" * len(new) for line in self.lines[1:])]
        self.metrics.close()
        write_whole(self.path, "".join(f"{line}\r\n" for line in table))
        self.metrics = self.path.open("a", encoding="utf-8", newline="")

    def close(self) -> None:
        self.metrics.close()
        self.samples.close()

    def sync(self) -> None:
        """Wait until both are on disk."""
        for file in (self.metrics, self.samples):
            os.fsync(file.fileno())
