"""Several processes: the update, the statistics and the run are those of one."""

import contextlib
import copy
import csv
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from config import PPOConfig, UserError, pick_dtype
from ppo import PPOTrainer
from reward import score_texts
from support import load, processes, run_folder
from support.command_line import FINAL, how_to_go_on, new_run_folder, read_command_line
from support.models import encode_prompt, load_gpt2_config, load_policy, load_tokenizer
from tests.conftest import write_gpt2
from train_ppo import main

ROOT = Path(__file__).resolve().parent.parent

PROMPTS = ["刚收到货,感觉", "衣服", "这本书很好"]
RUN = "--preset demo --device cpu --batch_size 16 --minibatch_size 8 --eval_samples 16 --log_samples_every 0".split()


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


def three_steps(rank, n_processes, folder, gpt2_folder):
    """Three PPO steps as one of some processes; weights and statistics to a file.

    In the third the last process's first gradient is NaN.
    """
    torch.set_num_threads(1)
    if n_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=n_processes)
    tokenizer = load_tokenizer(gpt2_folder)
    model = load_policy(gpt2_folder, load_gpt2_config(gpt2_folder))
    sizes = dict(batch_size=16, minibatch_size=8, micro_batch_size=1, gen_len=8)
    config = PPOConfig(**sizes, ppo_epochs=2, lr=1e-4, dtype="float32", device="cpu")
    trainer = PPOTrainer(config, model, copy.deepcopy(model), tokenizer)
    queries = [encode_prompt(tokenizer, PROMPTS[i % 3]) for i in range(16)]
    stats, collectives = [], []
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
            processes.all_reduce_max(0)
        collectives.append(sum(count))
    os.environ["LOCAL_RANK"] = str(rank)

    def build() -> bool:
        found = (Path(folder) / "built").exists()
        (Path(folder) / "built").touch()
        return found

    found = processes.local_rank_0_first(build)
    results = {"weights": model.state_dict(), "average": trainer.policy_for_saving.state_dict(), "stats": stats}
    results |= {"responses": responses, "found": found, "collectives": collectives}
    torch.save(results, f"{folder}/{n_processes}-{rank}.pt")
    if n_processes > 1:
        processes.exit_process(0)


def run_three_steps(n_processes, folder, gpt2_folder) -> list[dict]:
    multiprocessing.spawn(three_steps, (n_processes, str(folder), gpt2_folder), n_processes)
    return [torch.load(folder / f"{n_processes}-{rank}.pt") for rank in range(n_processes)]


def distance(one, other):
    """Norm of the difference over the norm of the weights, all parameters together."""
    difference = sum(((one[name] - other[name]) ** 2).sum() for name in one)
    return (difference / sum((value**2).sum() for value in one.values())).sqrt().item()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, gpt2_folder):
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    three_steps(0, 1, folder, gpt2_folder)
    torch.set_num_threads(threads)
    return torch.load(folder / "1-0.pt")


@pytest.mark.parametrize("n_processes", [2, 4])
def test_the_update_does_not_depend_on_the_number_of_processes(n_processes, alone, tmp_path, gpt2_folder):
    for rank, result in enumerate(run_three_steps(n_processes, tmp_path, gpt2_folder)):
        assert result["found"] == (rank > 0)  # the first process of a machine builds, the others find
        assert distance(alone["weights"], result["weights"]) < 1e-5
        assert distance(alone["average"], result["average"]) < 1e-5
        assert all(one.equal(other) for one, other in zip(alone["responses"], result["responses"]))
        for one, other in zip(alone["stats"][:2], result["stats"]):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        assert [stats["ppo/skipped"] for stats in result["stats"]] == [0, 0, 1]  # by all processes, or by none
        assert all(
            0 < count <= 12 for count in result["collectives"]
        )  # each is a wait for the slowest and for the network


def test_shares_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    for n in (0, 1, 2, 3, 10):
        rows = []
        for rank in range(3):
            monkeypatch.setattr(processes, "rank", lambda: rank)
            rows += list(range(n))[processes.rows_of_rank(n)]
        assert rows == list(range(n))


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


def test_a_machine_that_joins_finds_the_folder_of_its_job(tmp_path, monkeypatch):
    """It was never restarted: the job is written in the folder of a run that is not finished."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a/job")

    def opened(**options) -> Path:
        config = PPOConfig(runs_dir=str(tmp_path), **options)
        folder = run_folder.RunFolder(new_run_folder(config), config)
        folder.open(SimpleNamespace(n_steps=0, device="cpu", dtype=torch.float32), resume=False)
        folder.lock.release()
        return folder.path

    assert opened() == tmp_path / "a-job" == new_run_folder(PPOConfig(runs_dir=str(tmp_path)))
    assert opened(run_name="mine") == new_run_folder(PPOConfig(runs_dir=str(tmp_path), run_name="mine"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    with pytest.raises(UserError, match="exists already"):
        new_run_folder(PPOConfig(runs_dir=str(tmp_path), run_name="mine"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a/job")
    for name in FINAL:
        (tmp_path / "a-job" / name).touch()
    assert new_run_folder(PPOConfig(runs_dir=str(tmp_path))).name == "a-job-2"


def test_a_restart_without_the_run_folder_says_so_in_capitals(tmp_path, monkeypatch, capsys):
    flags = ["--preset", "demo", "--runs_dir", str(tmp_path), "--run_name", "job"]
    assert read_command_line(flags)[2] == "train" and "BEGINS AT STEP 1" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert read_command_line(flags)[2] == "train"
    assert "ITS RUN FOLDER IS NOT HERE: IT BEGINS AT STEP 1" in capsys.readouterr().out


def test_all_processes_of_a_start_agree_on_a_prefix_and_later_ones_on_another(tmp_path):
    """In torchrun's store, which still holds the keys of an earlier start; the others come before the first."""
    stores = [dist.FileStore(str(tmp_path / "store"), 3) for _ in range(3)]
    for store in stores:
        store.set_timeout(timedelta(seconds=5))
    prefixes = []
    for _ in range(2):
        with ThreadPoolExecutor() as threads:
            others = [threads.submit(processes.agree_on_prefix, stores[rank], rank, 3) for rank in (1, 2)]
            time.sleep(0.2)
            prefixes.append(processes.agree_on_prefix(stores[0], 0, 3))
            assert [other.result(5) for other in others] == [prefixes[-1]] * 2
    assert prefixes[0] != prefixes[1]


@pytest.mark.parametrize(("master", "peer"), [("10.0.0.1", ""), ("127.0.1.1", "10.0.0.2"), ("127.0.0.1", "127.0.0.1")])
def test_gloo_and_nccl_take_the_interface_that_leads_to_the_other_machine(master, peer, monkeypatch):
    """As on the machine of MASTER_ADDR, whose own name may mean a loopback address there."""
    store = dist.HashStore()
    store.set("address-1", peer)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setattr(processes, "local_address", {"10.0.0.2": "10.0.0.1"}.get if peer[:2] == "10" else lambda a: a)
    if master == "127.0.1.1":
        monkeypatch.setattr(processes, "local_address", lambda host: "10.0.0.1" if host == peer else "127.0.1.1")
    monkeypatch.setattr(processes, "interface_of", {"10.0.0.1": "eth0", "127.0.0.1": "lo", "127.0.1.1": "lo"}.get)
    processes.choose_interface(store, 0, 2)
    name = "lo" if peer == "127.0.0.1" else "eth0"
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (name, f"={name}")


def test_an_interface_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr(processes, "local_address", lambda host: pytest.fail("looked for another"))
    processes.choose_interface(dist.HashStore(), 0, 2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_an_interface_is_found_by_its_address_or_the_user_is_told(monkeypatch):
    assert processes.interface_of(processes.local_address("127.0.0.1")) in ("lo", "lo0")
    assert processes.interface_of("192.0.2.1") is None  # of documentation, RFC 5737
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(processes, "local_address", lambda host: "192.0.2.1")
    with pytest.raises(UserError, match="no network interface has the address 192.0.2.1; set GLOO_SOCKET_IFNAME"):
        processes.choose_interface(dist.HashStore(), 0, 1)


def test_a_checkpoint_is_due_by_time_too(tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda *_: saved.append(clock[0]))
    trainer = SimpleNamespace(n_steps=0, device="cpu", dtype=torch.float32)
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


def test_the_way_on_names_the_newest_checkpoint_where_there_is_one(tmp_path):
    run_dir = tmp_path / "run"
    assert "the first machine has the checkpoints" in how_to_go_on(run_dir)
    run_dir.mkdir()
    assert "there is no checkpoint yet" in how_to_go_on(run_dir)
    for step in ("step-000002", "step-000010"):
        (run_dir / "checkpoints" / step).mkdir(parents=True)
    said = how_to_go_on(run_dir)
    assert f"{run_dir}/checkpoints/step-000010; " in said and f"--resume {run_dir}" in said


def test_a_run_goes_on_with_other_waits_and_where_an_older_program_knew_none(runs, tmp_path):
    copied = shutil.copytree(runs[0] / "runs" / "two", tmp_path / "copied")
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    for name in ("process_timeout", "save_every_minutes"):
        del config[name]
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    config, *_ = read_command_line(["--resume", str(copied), "--process_timeout", "9", "--episodes", "64"])
    assert (config.process_timeout, config.save_every_minutes) == (9, 10)


# ----------------------------------------------------------------------------------------------
# Two machines: two processes that take themselves to be on different hosts


def on_two_hosts(rank, folder):
    """What is said, on each, where the machines differ; to a file. Each has a working directory of its own."""
    os.chdir(f"{folder}/m{rank}")
    socket.gethostname = lambda: f"gpu-{rank + 1}"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    defaults = dict(batch_size=16, minibatch_size=8, device="cpu", reward="builtins:len", gen_len=8)

    def said(gpt2, **options) -> str:
        try:
            trainer, *_ = load.load_models(PPOConfig(**defaults | options), Path(gpt2))
        except UserError as error:
            return str(error)
        return f"{load.hash_of(trainer.model.state_dict())} {load.hash_of(trainer.ref_model.state_dict())}"

    results = {
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
    load.pick_dtype, torch.__version__ = pick_dtype, torch.__version__.removesuffix("-other")

    results["code"] = main(["--eval_only", "runs/two"])  # a folder that the first machine alone has

    processes.set_timeout(1)
    try:
        if rank == 0:
            processes.all_reduce_max(0)  # the other never comes
        time.sleep(3)
    except RuntimeError as error:
        results["timeout"] = processes.lost_process(error)
    torch.save(results, f"{folder}/{rank}.pt")
    processes.exit_process(0)


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
    multiprocessing.spawn(on_two_hosts, (str(folder),), 2)
    return folder, *(torch.load(folder / f"{rank}.pt") for rank in range(2))


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
    assert re.fullmatch(r"(\w{12}) \1", first["demo"]) and first["demo"] == second["demo"]
    assert first["same"] == second["same"] != first["demo"]


def test_a_model_on_the_first_machine_is_judged_by_both(machines, runs):
    folder, first, second = machines
    assert first["code"] == second["code"] == 0 and not (folder / "m1" / "runs").exists()
    paths = [run / "two" / "evaluation.json" for run in (runs[0] / "runs", folder / "m0" / "runs")]
    once, again = (json.loads(path.read_text(encoding="utf-8"))["after"] for path in paths)
    assert (again["reward"], again["kl"]) == pytest.approx((once["reward"], once["kl"]), abs=1e-4)


def test_a_machine_that_does_not_answer_is_given_up(machines):
    _, first, _ = machines
    assert re.search(
        r"is gone: it did not answer for 1 s \(--process_timeout\), .* in on_two_hosts\(\) of test_dist",
        first["timeout"],
    )


# ----------------------------------------------------------------------------------------------
# Whole runs below torchrun


C10D = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job"]


def torchrun(tmp_path, *flags, n_processes=2, options=()):
    """Start train_ppo.py below torchrun, in `tmp_path`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_processes), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command += [str(ROOT / "train_ppo.py"), *RUN, "--runs_dir", str(tmp_path / "runs"), *flags]
    return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, start_new_session=True, **streams)


def finish(process) -> tuple[int, str, str]:
    """Exit code, output and errors; a run that hangs is killed with all its processes."""
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun kills those that do not end by that
        process.communicate()
        raise
    return process.returncode, output, errors


def rows(run_dir):
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def same_curve(one, other):
    curves = [[float(row["env/reward_mean"]) for row in table] for table in (one, other)]
    return curves[0] == pytest.approx(curves[1], abs=0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo):
    """Three steps by two processes, and the same run of six steps by one."""
    tmp_path = tmp_path_factory.mktemp("several")
    code = main([*RUN, "--runs_dir", str(tmp_path / "runs"), "--run_name", "one", "--episodes", "96"])
    assert code == 0
    process = torchrun(tmp_path, "--run_name", "two", "--episodes", "48", "--save_every", "2", options=["--standalone"])
    code, output, errors = finish(process)
    assert code == 0, errors
    return tmp_path, output, errors


def test_a_run_of_two_processes_is_the_run_of_one(runs):
    tmp_path, output, _ = runs
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert same_curve(rows(one)[:3], rows(two))
    lines = [(run / "samples.jsonl").read_text(encoding="utf-8").splitlines() for run in (one, two)]
    completions = [[json.loads(line)["completion"] for line in part[:48]] for part in lines]
    assert sum(a == b for a, b in zip(*completions)) >= 46


def test_one_process_alone_writes_and_prints(runs):
    tmp_path, output, _ = runs
    assert output.count("run folder") == output.count("model, metrics and pictures are in") == 1
    assert "2 processes" in output
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]
    one, two = ({path.name for path in (tmp_path / "runs" / name).iterdir()} for name in ("one", "two"))
    assert two == one | {".torchrun-id"}


@pytest.mark.parametrize("n_processes", [1, 4])
def test_a_run_goes_on_with_another_number_of_processes(runs, n_processes):
    tmp_path = runs[0]
    copied = shutil.copytree(tmp_path / "runs" / "two", tmp_path / "runs" / f"continued-{n_processes}")
    if n_processes == 1:
        assert main(["--resume", str(copied), "--episodes", "96"]) == 0
    else:
        process = torchrun(tmp_path, "--resume", str(copied), "--episodes", "96", n_processes=n_processes)
        code, _, errors = finish(process)
        assert code == 0, errors
    assert same_curve(rows(tmp_path / "runs" / "one"), rows(copied))


def test_a_batch_that_does_not_divide_is_refused(tmp_path, demo):
    process = torchrun(tmp_path, "--batch_size", "18", "--minibatch_size", "9")
    code, _, errors = finish(process)
    assert code != 0
    assert re.findall("train_ppo.py: error: .*", errors) == [
        "train_ppo.py: error: --minibatch_size 9 does not divide by the 2 processes, each of which takes an equal share"
    ]
    assert "Traceback" not in errors.split("--minibatch_size")[0]
    assert not (tmp_path / "runs").exists()


def test_an_error_on_one_process_ends_all_with_one_message(tmp_path, demo):
    (tmp_path / "only_rank_1.py").write_text(
        "import os\n"
        "def score(texts):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('no such word')\n"
        "    return [0.5] * len(texts)\n"
    )
    process = torchrun(tmp_path, "--reward", "only_rank_1:score", "--run_name", "broken")
    code, _, errors = finish(process)
    assert code != 0
    messages = re.findall("train_ppo.py: error: .*", errors)
    assert len(messages) == 1 and "KeyError: 'no such word'" in messages[0]
    assert "KeyError" in (tmp_path / "runs" / "broken" / "error.log").read_text()


def test_a_killed_process_is_replaced_and_the_run_goes_on(tmp_path, demo):
    (tmp_path / "dies_once.py").write_text(
        "import os, pathlib, signal\n"
        "calls = []\n"
        "def score(texts):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and len(calls) == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [len(text) / 20 for text in texts]\n"
    )
    flags = ["--reward", "dies_once:score", "--save_every", "2", "--episodes", "96"]
    process = torchrun(tmp_path, *flags, options=["--max-restarts", "1", *C10D])
    code, output, errors = finish(process)
    assert code == 0, errors
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["job"]
    assert [row["step"] for row in rows(tmp_path / "runs" / "job")] == list("123456")
    assert 'train_ppo.py", line' not in errors  # the others ended without a traceback
    lost = re.findall("train_ppo.py: error: another machine or process.* is gone: it has closed .*", errors)
    assert len(lost) == 1 and f"the newest checkpoint is {tmp_path}/runs/job/checkpoints/step-000004;" in lost[0]
    assert "4/6" in errors  # the restarted processes began behind the checkpoint of step 4


def test_ctrl_c_stops_all_after_the_same_step(tmp_path, demo):
    process = torchrun(tmp_path, "--episodes", "16000", "--run_name", "stopped", "--save_every", "0")
    metrics = tmp_path / "runs" / "stopped" / "metrics.csv"
    deadline = time.monotonic() + 60
    while (not metrics.exists() or metrics.read_text().count("\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    code, output, _ = finish(process)
    assert code != 0
    saved = sorted(path.name for path in (tmp_path / "runs" / "stopped" / "checkpoints").iterdir())
    assert saved == [f"step-{int(rows(tmp_path / 'runs' / 'stopped')[-1]['step']):06d}"]
    assert f"stopped after step {len(rows(tmp_path / 'runs' / 'stopped'))}" in output
