"""Several processes: the update, the statistics and the run are those of one."""

import contextlib
import copy
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from config import PPOConfig
from ppo import PPOTrainer
from reward import score_texts
from support import collectives, load, meeting, run_folder
from support.command_line import FINAL, new_run_folder, read_command_line
from support.devices import pick_dtype
from support.errors import UserError
from support.hub import model_folder
from support.models import encode_prompt, load_gpt2_config, load_policy, load_tokenizer
from tests.helpers import ROOT, rows, write_gpt2
from tests.ranks import STEP, Ranks, agents_store, program
from train_ppo import main

PROMPTS = ["刚收到货,感觉", "衣服", "这本书很好"]
RUN = "--preset demo --device cpu --batch_size 16 --minibatch_size 8 --eval_samples 12 --log_samples_every 0".split()


@contextlib.contextmanager
def counted_collectives():
    """A list that gets, for every call of torch.distributed, its exchanges; what DDP sends of gradients is not seen."""
    count = []
    exchanges = {"all_reduce": 1, "broadcast": 1, "all_gather_object": 2, "broadcast_object_list": 2}
    calls = {name: getattr(dist, name) for name in exchanges}

    def counting(name, *args, **options):
        count.append(exchanges[name])
        return calls[name](*args, **options)

    for name in calls:
        setattr(dist, name, functools.partial(counting, name))
    yield count
    for name, call in calls.items():
        setattr(dist, name, call)


def three_steps(rank, n_processes, gpt2_folder, file):
    """Three PPO steps as one of some processes; weights and statistics to a file.

    In the third the last process's first gradient is NaN.
    """
    meeting.init_process_group()
    tokenizer = load_tokenizer(gpt2_folder)
    model = load_policy(gpt2_folder, load_gpt2_config(gpt2_folder))
    sizes = dict(batch_size=16, minibatch_size=8, micro_batch_size=1, gen_len=8)
    config = PPOConfig(**sizes, ppo_epochs=2, lr=1e-4, dtype="float32", device="cpu")
    trainer = PPOTrainer(config, model, copy.deepcopy(model), tokenizer)
    queries = [encode_prompt(tokenizer, PROMPTS[i % 3]) for i in range(16)]
    stats, exchanges = [], []
    for step in range(3):
        if step == 2 and rank == n_processes - 1:
            handle = model.transformer.ln_f.weight.register_hook(
                lambda gradient: handle.remove() or gradient * torch.nan
            )
        with counted_collectives() as count:
            responses = trainer.generate(queries)
            of_many_lengths = [response[: 1 + i % 8] for i, response in enumerate(responses)]
            scores = score_texts(lambda texts: [0.1 * int(text) for text in texts], [str(i % 5) for i in range(16)])
            stats.append(trainer.step(queries, of_many_lengths, scores))
            collectives.all_reduce_max(0)
        exchanges.append(sum(count))
    results = {"weights": model.state_dict(), "average": trainer.policy_for_saving.state_dict(), "stats": stats}
    results |= {"responses": responses, "exchanges": exchanges}
    torch.save(results, file.format(rank))
    if n_processes > 1:
        meeting.exit_process(0)


def distance(one, other):
    """Norm of the difference over the norm of the weights, all parameters together."""
    difference = sum(((one[name] - other[name]) ** 2).sum() for name in one)
    return (difference / sum((value**2).sum() for value in one.values())).sqrt().item()


def test_the_update_does_not_depend_on_the_number_of_processes(tmp_path, gpt2_folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    three_steps(0, 1, gpt2_folder, str(tmp_path / "alone"))
    torch.set_num_threads(threads)
    ranks = Ranks(tmp_path, three_steps, 4, gpt2_folder, "result-{}", n=4, store=agents_store())
    assert ranks.wait() == [0] * 4, ranks.err(0)
    alone = torch.load(tmp_path / "alone")
    for rank in range(4):
        result = torch.load(tmp_path / f"result-{rank}")
        assert distance(alone["weights"], result["weights"]) < 1e-5
        assert distance(alone["average"], result["average"]) < 1e-5
        assert all(one.equal(other) for one, other in zip(alone["responses"], result["responses"]))
        for one, other in zip(alone["stats"][:2], result["stats"]):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        assert [stats["ppo/skipped"] for stats in result["stats"]] == [0, 0, 1]  # by all processes, or by none
        assert all(0 < count <= 12 for count in result["exchanges"])  # each waits for the slowest and the network


def test_a_restarted_process_finds_the_folder_of_its_run(tmp_path, monkeypatch):
    def name(torchrun_id, restarts):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        return new_run_folder(PPOConfig(runs_dir=str(tmp_path))).name

    assert name("a/job", 0) == name("a/job", 1) == "a-job"  # nothing is there yet
    (tmp_path / "a-job").mkdir()
    assert name("a/job", 0) == "a-job-2" and name("a/job", 1) == "a-job"
    (tmp_path / "a-job-2").mkdir()
    assert name("a/job", 0) == "a-job-3" and name("a/job", 2) == "a-job-2"
    assert name("none", 0) == name("none", 1) == f"torchrun-{os.getppid()}"


def test_a_restart_without_the_run_folder_says_so(tmp_path, monkeypatch, capsys):
    flags = ["--preset", "demo", "--runs_dir", str(tmp_path), "--run_name", "job"]
    assert read_command_line(flags)[2] == "train" and "starts anew" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert read_command_line(flags)[2] == "train"
    assert "starts anew" in capsys.readouterr().out


def test_a_checkpoint_is_due_by_time_too(tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda *_: saved.append(clock[0]))
    engine = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    trainer = SimpleNamespace(n_steps=0, n_trained=1, n_parameters=2, engine=engine)
    for minutes, expected in ((10.0, [12 * 60, 24 * 60]), (0.0, [])):
        clock[0] = 0.0
        saved.clear()
        config = PPOConfig(save_every=0, save_every_minutes=minutes, batch_size=1, minibatch_size=1)
        folder = run_folder.RunFolder(tmp_path / str(minutes), config)
        folder.open(trainer, resume=False)
        for step in range(1, 9):  # of four minutes each
            clock[0] += 4 * 60
            if folder.checkpoint_due(step):
                folder.save_checkpoint(trainer)
        assert saved == expected


# ----------------------------------------------------------------------------------------------
# Two machines: two processes that take themselves to be on different hosts


def on_two_hosts(rank):
    """What is said, on each, where the machines differ; to a file. Each has a working directory of its own."""
    meeting.init_process_group()
    defaults = dict(batch_size=16, minibatch_size=8, device="cpu", reward="builtins:len", gen_len=8)

    def said(gpt2, **options) -> str:
        try:
            load.model_folder = lambda *_: Path(gpt2)
            policy, *_ = load.load(PPOConfig(**defaults | options))
        except UserError as error:
            return str(error)
        return load.hash_of(policy.state_dict())

    results = {
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "restarts": meeting.restart_count(),
        "prompts": said("gpt2", dtype="float32", model_name="gpt2", prompts_file="prompts.txt"),
        "same": said("gpt2", dtype="float32", model_name="gpt2"),
        "weights": said("other", dtype="float32", model_name="other"),
        "demo": said("other", dtype="float32", model_name="demo"),
        "lines": said("gpt2", dtype="float32", model_name="gpt2", prompts_file="lines.txt"),
    }
    results["reward"] = said("gpt2", dtype="float32", model_name="gpt2", reward="its_own:score")
    program = load.PROGRAM
    load.PROGRAM = program[: len(program) - rank]
    results["program"] = said("gpt2", dtype="float32", model_name="gpt2")
    load.PROGRAM = program
    load.pick_dtype = lambda *_: (torch.float32, torch.bfloat16)[rank]
    results["dtype"] = said("gpt2", model_name="gpt2")
    torch.__version__ += ("", "-other")[rank]
    results["version"] = said("gpt2", model_name="gpt2")
    load.pick_dtype, load.model_folder = pick_dtype, model_folder
    torch.__version__ = torch.__version__.removesuffix("-other")

    del os.environ["WORLD_SIZE"]  # the group is there already
    results["code"] = main(
        ["--eval_only", "runs/two", "--reward", "tests.ranks:killed"]
    )  # a folder that the first machine alone has

    torch.save(results, "results.pt")
    meeting.exit_process(0)


@pytest.fixture(scope="module")
def machines(tmp_path_factory, runs):
    """What each of two machines was told."""
    folder = tmp_path_factory.mktemp("machines")
    for rank in range(2):
        write_gpt2(folder / f"m{rank}" / "gpt2")
        weights = torch.load(write_gpt2(folder / f"m{rank}" / "other") / "pytorch_model.bin")
        weights["transformer.ln_f.bias"][3] += 0.1 + 1e-6 * rank
        torch.save(weights, folder / f"m{rank}" / "other" / "pytorch_model.bin")
        (folder / f"m{rank}" / "its_own.py").write_text(f"def score(texts): return [{rank}] * len(texts)\n")
        (folder / f"m{rank}" / "lines.txt").write_text("衣服\n" * (1 + rank), encoding="utf-8")
    (folder / "m0" / "prompts.txt").write_text("衣服\n", encoding="utf-8")
    shutil.copytree(runs[0] / "runs" / "two", folder / "m0" / "runs" / "two")
    ranks = Ranks(folder, on_two_hosts, on_hosts=True, restarts=(2, 0))
    assert ranks.wait() == [0, 0], ranks.err(0) + ranks.err(1)
    return folder, *(torch.load(folder / f"m{rank}" / "results.pt") for rank in range(2))


def test_an_error_names_the_other_machine(machines):
    _, *said = machines
    expected = "on host gpu-2: --prompts_file prompts.txt cannot be read: No such file or directory"
    assert [each["prompts"] for each in said] == [expected] * 2


def test_what_differs_between_machines_is_one_line(machines):
    _, first, second = machines
    for what, pattern in (
        ("weights", r"the hash of the weights of --model_name other is \w{12} on host gpu-1 and \w{12} on host gpu-2"),
        ("dtype", "--dtype auto is float32 on host gpu-1 and bfloat16 on host gpu-2: all processes need the same"),
        ("version", r"torch is [\d.+a-z]+ on host gpu-1 and [\d.+a-z]+-other on host gpu-2"),
        ("program", r"the hash of this program's files is \w{12} on host gpu-1 and \w{12} on host gpu-2"),
        ("reward", r"the hash of the file of --reward its_own:score is \w{12} on host gpu-1 and \w{12} on host gpu-2"),
        ("lines", r"the hash of the prompts is \w{12} on host gpu-1 and \w{12} on host gpu-2"),
    ):
        assert re.match(pattern, first[what]) and first[what] == second[what]


def test_the_demos_models_are_those_of_the_first_machine(machines):
    _, first, second = machines
    assert re.fullmatch(r"\w{12}", first["demo"]) and first["demo"] == second["demo"]
    assert first["same"] == second["same"] != first["demo"]


def test_a_model_on_the_first_machine_is_judged_by_both(machines, runs):
    folder, first, second = machines
    assert first["code"] == second["code"] == 0 and not (folder / "m1" / "runs").exists()
    paths = [run / "two" / "evaluation.json" for run in (runs[0] / "runs", folder / "m0" / "runs")]
    once, again = (json.loads(path.read_text(encoding="utf-8"))["after"] for path in paths)
    assert (again["reward"], again["kl"]) == pytest.approx((once["reward"], once["kl"]), abs=1e-4)


def test_a_machine_that_joins_late_learns_how_often_the_others_were_restarted(machines):
    assert [results["restarts"] for results in machines[1:]] == [2, 2]


def test_the_interface_between_the_machines_is_found(machines):
    assert all(results["interface"] in ("lo", "lo0") for results in machines[1:])


# ----------------------------------------------------------------------------------------------
# Whole runs below torchrun


def same_curve(one, other):
    curves = [[float(row["env/reward_mean"]) for row in table] for table in (one, other)]
    return curves[0] == pytest.approx(curves[1], abs=0.02)


def checkpoints(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def errors(text: str) -> list[str]:
    """The lines in which the program says why it ends."""
    return re.findall("^train_ppo.py: error: .*", text, re.MULTILINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo):
    """Six steps by two processes below torchrun, of which the second is killed in the fifth step and both are started
    again; and the same by one process, which nobody kills."""
    tmp_path = tmp_path_factory.mktemp("several")
    flags = [*RUN, "--reward", "tests.ranks:killed", "--episodes", "96", "--save_every", "2"]
    flags += ["--lr", "1e-6", "--runs_dir", str(tmp_path / "runs")]  # so small that rounding draws no other token
    assert main([*flags, "--run_name", "one"]) == 0
    options = "--nproc-per-node 2 --max-restarts 1 --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id two"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), str(ROOT / "train_ppo.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, said = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun kills those that do not end by that
        process.communicate()
        raise
    assert process.returncode == 0, said
    return tmp_path, output, said


def test_a_run_of_two_processes_is_the_run_of_one(runs):
    """Though one of them was killed and the run went on from its last checkpoint."""
    tmp_path, *_ = runs
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert [row["step"] for row in rows(two)] == list("123456")
    assert same_curve(rows(one), rows(two))
    lines = [(run / "samples.jsonl").read_text(encoding="utf-8").splitlines() for run in (one, two)]
    completions = [[json.loads(line)["completion"] for line in part] for part in lines]
    assert len(completions[0]) == len(completions[1]) == 96
    assert sum(a == b for a, b in zip(*completions)) >= 90


def test_one_process_alone_writes_and_prints(runs):
    tmp_path, output, _ = runs
    assert output.count("run folder") == 2  # in either start
    assert output.count("model, metrics and report.md are in") == 1
    assert "2 processes, each on cpu in float32" in output
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]
    one, two = ({path.name for path in (tmp_path / "runs" / name).iterdir()} for name in ("one", "two"))
    assert two == one


def test_a_killed_process_is_replaced_and_the_run_goes_on(runs):
    tmp_path, _, said = runs
    run = tmp_path / "runs" / "two"
    assert 'train_ppo.py", line' not in said  # the other ended without a traceback
    lost = [line for line in errors(said) if "another machine or process" in line]
    assert len(lost) == 1 and "is gone: it has closed its connection" in lost[0]
    assert f"python train_ppo.py --resume {run} --reward tests.ranks:killed" in lost[0]
    starts = [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]
    assert [(start["step"], start["processes"]) for start in starts] == [(1, 2), (5, 2)]


def run_ranks(folder, *flags, n=2, **options) -> tuple[Ranks, list[int]]:
    """train_ppo.py by n processes in a folder, and their exit codes."""
    ranks = Ranks(folder, program, [*RUN, "--runs_dir", "runs", *flags], n=n, store=agents_store(), **options)
    return ranks, ranks.wait()


@pytest.fixture(scope="module", params=[("interrupted", signal.SIGINT), ("terminated", signal.SIGTERM)])
def stopped(request, tmp_path_factory, demo):
    """A run of two processes of which the second alone gets a signal, in the fifth step."""
    reward, number = request.param
    folder = tmp_path_factory.mktemp(reward)
    flags = ["--reward", f"tests.ranks:{reward}", "--episodes", "96", "--save_every", "0", "--run_name", "stopped"]
    ranks, codes = run_ranks(folder, *flags)
    assert codes == [128 + number] * 2, ranks.err(0) + ranks.err(1)
    return ranks, folder / "runs" / "stopped"


def test_a_signal_to_one_process_stops_all_after_the_same_step(stopped):
    ranks, run = stopped
    assert len(rows(run)) == STEP and checkpoints(run) == [f"step-{STEP:06d}"]
    assert f"stopped after step {STEP}; go on with: python train_ppo.py --resume runs/stopped" in ranks.out(0)
    assert ranks.out(1) == "" and errors(ranks.err(0) + ranks.err(1)) == []


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    """From a checkpoint of two, with four and with one; and a run of one goes on with four."""
    for name in ("one", "two"):
        run = shutil.copytree(runs[0] / "runs" / name, tmp_path / "runs" / name)
        for output in FINAL[1:]:
            (run / output).unlink()
        shutil.rmtree(run / "checkpoints" / "step-000006")
        shutil.rmtree(run / "model")
    alone = shutil.copytree(tmp_path / "runs" / "two", tmp_path / "runs" / "alone")
    assert main(["--resume", str(alone), "--episodes", "96", "--reward", "tests.ranks:killed"]) == 0
    ranks = Ranks(
        tmp_path, program, ["--resume", "runs/one", "--reward", "tests.ranks:killed"], n=4, store=agents_store()
    )
    assert ranks.wait() == [0] * 4, ranks.err(0)
    for name in ("one", "alone"):
        assert [row["step"] for row in rows(tmp_path / "runs" / name)] == list("123456")
        assert same_curve(rows(runs[0] / "runs" / "one"), rows(tmp_path / "runs" / name))


def test_a_batch_that_does_not_divide_is_refused(tmp_path, demo):
    """By all, in one line and in torchrun's report of each."""
    ranks, codes = run_ranks(tmp_path, "--batch_size", "18", "--minibatch_size", "9")
    why = "--minibatch_size 9 is not divisible by the 2 processes, each of which takes an equal share"
    assert codes == [2, 2] and not (tmp_path / "runs").exists()
    assert ranks.err(0) == f"train_ppo.py: error: {why}\n" and ranks.err(1) == ""
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))["message"]["message"] == why


def test_help_is_printed_once_and_ends_all_well(tmp_path):
    ranks, codes = run_ranks(tmp_path, "--help")
    assert codes == [0, 0]
    assert ranks.out(0).count("--process_timeout") == 1 and ranks.out(1) == ranks.err(0) == ranks.err(1) == ""


def test_an_error_on_one_process_ends_all_with_one_message(tmp_path, demo):
    ranks, codes = run_ranks(tmp_path, "--reward", "tests.ranks:fails", "--run_name", "broken", "--save_every", "0")
    assert codes == [2, 2]
    messages = errors(ranks.err(0) + ranks.err(1))
    assert len(messages) == 1 and "step 5: " in messages[0] and "KeyError: 'no such word'" in messages[0]
    assert "KeyError" in (tmp_path / "runs" / "broken" / "error.log").read_text()
    assert checkpoints(tmp_path / "runs" / "broken") == ["step-000004"]


def test_the_time_that_a_process_is_waited_for_is_the_users(runs, monkeypatch):
    """Also where a run goes on."""
    waits = []
    monkeypatch.setattr(meeting, "set_timeout", waits.append)
    assert main(["--resume", str(runs[0] / "runs" / "one")]) == 0
    assert main(["--resume", str(runs[0] / "runs" / "one"), "--process_timeout", "9", "--episodes", "96"]) == 0
    assert waits == [600, 9]
