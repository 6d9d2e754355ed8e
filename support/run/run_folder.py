"""The folder of a run, and everything written into it.

runs/<name>/
    config.json       the settings of the run
    inputs.json       hashes of models, prompts and your own reward's file, which --resume compares
    environment.jsonl one line per start: its command and first step, versions, device, dtype, processes
    metrics.csv       one row per step
    samples.jsonl     one line per completion
    evaluation.json   the evaluation before and after, with all samples; results.json is the same without them
    inputs/           the file of your own reward and the prompts' file, as they were
    checkpoints/      see checkpoint.py
    error.log         the traceback of a reward function that failed, and its texts
    model/  rewards.png  report.md      written at the end of a run

Every process calls every function; only rank 0 reads and writes.
"""

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from config import PPOConfig
from support.common.errors import RewardError, UserError, escaped
from support.common.files import disk_errors, read_json, remove, whole, write_whole
from support.compute import processes
from support.compute.devices import environment
from support.models.model_card import write_results
from support.run.checkpoint import load_checkpoint, save_checkpoint
from support.run.compare import STARTS, read_starts
from support.run.evaluation import Results
from support.run.folders import FINAL, new_run_folder
from support.run.load import hash_of, reward_files
from support.run.log import RunLog
from support.run.report import run_report
from support.run.results import before_after_table, results_table
from support.run.settings import changes, save_config, total_steps
from support.run.text_trainer import save_trained


class RunFolder:
    """The folder of a training run, locked while it is open: `with RunFolder.create(...)`, or `resume`."""

    def __init__(self, path: Path, trainer, log: RunLog | None):
        self.path, self.config, self.trainer, self.log = path, trainer.config, trainer, log
        self.logged = log.rows if log else []  # rows of metrics.csv up to the trainer's step
        self.last_step, self.saved_at = total_steps(trainer.config), time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path, trainer, inputs: dict[str, str], argv: list[str]) -> Iterator["RunFolder"]:
        """Create the folder of a new run. Without --run_name, runs started in the same second get different names.

        inputs: see `load.input_hashes`. argv: the command line. Raises UserError if the folder can't be created.
        """

        def make() -> Path:
            free = new_run_folder(trainer.config) if path.exists() else path
            with disk_errors(free):
                free.mkdir(parents=True)
            return free

        made = processes.broadcast_from_rank_0(make)
        trainer.config.run_name = made.name
        with locked(made), cls.begin(made, trainer, inputs, argv) as folder:
            yield folder

    @classmethod
    @contextlib.contextmanager
    def resume(cls, path: Path, trainer, inputs: dict[str, str], argv: list[str]) -> Iterator["RunFolder"]:
        """Open the folder of an earlier run, and load its newest checkpoint into the trainer. Raises UserError, without
        changing a file, if the inputs have changed, a file is damaged, or the run has lost its checkpoints."""
        with locked(path):
            compare_inputs(path, inputs)
            load_checkpoint(trainer, path / "checkpoints")
            with cls.begin(path, trainer, inputs, argv) as folder:
                yield folder

    @classmethod
    @contextlib.contextmanager
    def begin(cls, path: Path, trainer, inputs: dict[str, str], argv: list[str]) -> Iterator["RunFolder"]:
        """Start the log, or continue the log up to the trainer's step, and save the settings."""

        def write() -> RunLog:
            with disk_errors(path):
                log = RunLog(path, trainer.n_steps)
                (path / "checkpoints").mkdir(exist_ok=True)
                for leftover in [*path.glob(".partial-*"), *path.glob("checkpoints/.partial-*")]:
                    remove(leftover)  # left by a kill
            note_start(path, trainer, argv, trainer.n_steps + 1)
            write_whole(path / "inputs.json", json.dumps(inputs, ensure_ascii=False, indent=2) + "\n")
            for file in map(Path, filter(None, (*reward_files(trainer.config), trainer.config.prompts_file))):
                content = file.read_bytes()
                with whole(path / "inputs" / f"{file.stem}-{hash_of(content)}{file.suffix}") as copied:
                    copied.parent.mkdir(exist_ok=True)
                    copied.write_bytes(content)
            save_config(trainer.config, path / "config.json")  # last: a folder that has it can be resumed
            return log

        folder = cls(path, trainer, on_rank_0(write))
        config, engine = trainer.config, trainer.engine
        print(f"training {engine.n_trained / 1e6:.1f} of {trainer.model.num_parameters() / 1e6:.1f} million parameters")
        if changed := [f"{name} {here} (preset: {preset})" for name, (preset, here) in changes(config).items()]:
            print(f"changed from the preset {config.preset}: {', '.join(changed)}")
        print(f"run folder {path}, {folder.last_step} steps of {config.batch_size} completions")
        several = f"{processes.world_size()} processes, each " if processes.world_size() > 1 else ""
        print(f"{several}on {engine.device} in {str(engine.dtype).removeprefix('torch.')}")
        try:
            yield folder
        finally:
            if folder.log:
                folder.log.close()

    def read_results(self) -> Results | None:
        return read_results(self.path)

    def write_results(self, results: Results) -> None:
        if self.log:
            results.write(self.path / "evaluation.json")

    def save_settings(self) -> None:
        """Save the settings again after the KL coefficient was chosen."""
        if self.log:
            save_config(self.config, self.path / "config.json")

    def write_log(self, row: dict, samples: list[tuple]) -> None:
        """Write a step's row of metrics.csv, and its samples, (prompt, completion, score), to samples.jsonl."""
        if self.log:
            names = ("prompt", "completion", "score")
            self.log.write(row, [{"step": row["step"], **dict(zip(names, sample))} for sample in samples])

    def checkpoint_due(self) -> bool:
        """Return True after the last step, every `save_every` steps, and `save_every_minutes` after the last one."""
        step, every, minutes = self.trainer.n_steps, self.config.save_every, self.config.save_every_minutes
        old = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return step == self.last_step or (every > 0 and step % every == 0) or old

    def save_checkpoint(self) -> None:
        if self.log:
            with disk_errors(self.path):
                self.log.sync()  # the log must be complete up to the checkpoint's step
            save_checkpoint(self.trainer, self.path / "checkpoints", self.config.keep_checkpoints)
        self.saved_at = time.monotonic()

    def save_model(self, example: str) -> None:
        """Save the trained policy in model/, replacing an earlier one. example: a prompt for its card."""
        if self.log:
            with whole(self.path / "model") as partial:
                save_trained(self.trainer, partial, example)

    @contextlib.contextmanager
    def errors_explained(self):
        """Raise UserError if training fails. If a reward function fails, save a checkpoint first."""
        with disk_errors(self.path), failures_explained(self.path, lambda: f"step {self.trainer.n_steps + 1}"):
            try:
                yield
            except RewardError:
                self.save_checkpoint()
                raise


def on_rank_0(function: Callable):
    """Return function() on rank 0, None on the other ranks. Raises UserError on all ranks if it raises one."""
    results = []
    processes.broadcast_from_rank_0(lambda: results.append(function()))
    return results[0] if results else None


@contextlib.contextmanager
def locked(path: Path):
    """Lock a run folder for this process during the block. Raises UserError if another process has locked it."""
    lock = FileLock(path / ".lock")

    def acquire() -> None:
        with disk_errors(path):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise UserError(f"another process is using {path}; wait for it to end, or stop it")

    on_rank_0(acquire)
    try:
        yield
    finally:
        lock.release()


def read_results(path: Path) -> Results | None:
    """Read a run's evaluation.json. Returns None if it doesn't exist yet."""
    return processes.broadcast_from_rank_0(lambda: Results.read(path / "evaluation.json"))


def compare_inputs(path: Path, inputs: dict[str, str]) -> None:
    """Raise UserError if the run was started with other models, prompts or rewards than these."""
    file, evaluated = path / "inputs.json", path / "evaluation.json"
    before = processes.broadcast_from_rank_0(
        lambda: read_json(file, "remove it; it is recreated", missing={}) if evaluated.exists() else {}
    )
    for name, now in inputs.items():
        # The demo's models are built on each machine and may differ in the last digits
        if before.get(name, now) != now and not name.endswith(" demo"):
            what = f"{name} is {now}, but was {before[name]}"
            way = f"restore it, start a new run, or remove {file} to continue with the new one"
            raise UserError(f"an input has changed since {path} was started: {what}; {way}")


def note_start(path: Path, trainer, argv: list[str], step: int | None) -> None:
    """Add a line to environment.jsonl. step: the first step, or None if a saved model is evaluated."""
    engine = trainer.engine
    start = {"command": escaped(shlex.join(["python", "train_ppo.py", *argv])), "step": step}
    start |= {"parameters": trainer.model.num_parameters(), "parameters that train": engine.n_trained}
    start |= environment(engine.device)
    start |= {"dtype": str(engine.dtype).removeprefix("torch."), "processes": processes.world_size()}
    write_whole(path / STARTS, "".join(json.dumps(each) + "\n" for each in [*read_starts(path), start]))


@contextlib.contextmanager
def failures_explained(path: Path, where: Callable[[], str]):
    """Raise UserError, saying where it happened, if a reward or the arithmetic fails. A reward's traceback goes to
    error.log."""
    try:
        yield
    except RewardError as error:
        if processes.rank() == 0 and error.traceback:
            write_whole(path / "error.log", error.traceback)
        log = f"; the traceback and the texts are in {path / 'error.log'}" if error.traceback else ""
        raise UserError(f"{where()}: {error}{log}")
    except FloatingPointError as error:
        kept = "; the last checkpoint is kept" if any(path.glob("checkpoints/step-*")) else ""
        raise UserError(f"{where()}: {error}; try a lower --lr, or --dtype float32{kept}")


def write_ending(path: Path, config: PPOConfig, results: Results, prompts: list[str], draw) -> None:
    """Write evaluation.json, results.json, the picture, the model's card, and report.md. draw(out): draws the run."""
    with disk_errors(path / FINAL[-1]):
        (path / FINAL[-1]).unlink(missing_ok=True)  # the old report wouldn't match the new results
    results.write(path / "evaluation.json")
    write_whole(path / "results.json", json.dumps(results.without_samples(), ensure_ascii=False, indent=1) + "\n")
    if (path / "metrics.csv").exists():
        draw(path / "rewards.png")
    figures, texts = results_table(results), before_after_table(results.before.samples, results.after.samples)
    evaluation = f"**{results.verdict}**\n\n{figures}\n\nCompletions before and after (same random numbers):\n\n{texts}"
    write_results(path / "model", config, prompts, evaluation)
    write_whole(path / FINAL[-1], run_report(path, results))
