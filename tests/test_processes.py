"""Several processes: what they exchange, how they exit, and how a lost process is detected."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import distributed as dist

from config import PPOConfig
from reward import score_texts
from support.common.errors import UserError
from support.compute import processes
from tests.helpers import ROOT
from tests.ranks import Ranks
from train_ppo import main

ON_2 = "on host gpu-2: "
GLOO_TIMEOUT_CAN_CHANGE = Version(torch.__version__) >= Version("2.9.0")


def outcome(function, *arguments):
    """Return what a call returns, or the text of the exception that it raises."""
    try:
        return function(*arguments)
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def exchange(rank: int) -> None:
    """Save what each function returns on each of three processes. The first process is on another host."""
    socket.gethostname = lambda: ("gpu-1", "gpu-2", "gpu-2")[rank]
    os.environ["LOCAL_RANK"] = str((0, 0, 1)[rank])
    processes.init_process_group()
    print("printed by", rank)

    def fails_on(*ranks):
        def function():
            if rank in ranks:
                raise UserError(f"no room for {rank}")
            return rank

        return function

    rows = torch.zeros(5)
    mine = processes.rows_of_rank(5)
    rows[mine] = torch.arange(1.0, 6.0)[mine]
    from_rank_0 = [lambda: {"rank": rank}, fails_on(0), fails_on(1), lambda: sys.exit(f"help of {rank}")]
    results = {
        "rank": (processes.rank(), processes.world_size()),
        "rows": [list(range(n))[processes.rows_of_rank(n)] for n in (0, 2, 5, 10)],
        "sum": [processes.all_reduce_sum(rows).tolist(), rows.tolist()],
        "broadcast": [outcome(processes.broadcast_from_rank_0, function) for function in from_rank_0],
        "all": [outcome(processes.on_all_ranks, fails_on(*ranks)) for ranks in ((), (0,), (1, 2), (2,), (0, 2))],
    }
    versions = ("2.13", ("2.13", "2.13", "2.6")[rank])
    results["same"] = [outcome(processes.check_same, {"torch": version}) for version in versions]

    processes.set_timeout(0.5)
    if rank:
        while not Path("given-up").exists():
            time.sleep(0.05)
    elif GLOO_TIMEOUT_CAN_CHANGE:
        try:
            score_texts(len, ["a", "b", "c"])
        except RuntimeError as error:
            results["lost"] = processes.lost_process(error)
    Path("given-up").touch()
    torch.save(results, f"{rank}.pt")
    processes.exit_process((0, 130, 2)[rank])


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[Ranks, list[int], list[dict]]:
    folder = tmp_path_factory.mktemp("three")
    ranks = Ranks(folder, exchange, n=3)
    codes = ranks.wait()
    return ranks, codes, [torch.load(folder / f"{rank}.pt") for rank in range(3)]


FIRST, SECOND, THIRD = (f"UserError: {host}no room for {rank}" for rank, host in enumerate(("", ON_2, ON_2)))
DIFFER = "UserError: torch must agree on all hosts: gpu-1 has 2.13, gpu-2 has 2.6"


@pytest.mark.parametrize(
    ("name", "expected"),  # of the three ranks
    [
        ("rank", [(0, 3), (1, 3), (2, 3)]),
        ("rows", [[[], [], [0], [0, 1, 2]], [[], [0], [1, 2], [3, 4, 5]], [[], [1], [3, 4], [6, 7, 8, 9]]]),
        ("sum", [[[1, 2, 3, 4, 5]] * 2] * 3),
        ("broadcast", [[{"rank": 0}, FIRST, 0, "SystemExit: help of 0"]] * 3),
        ("all", [[rank, FIRST, SECOND, THIRD, FIRST] for rank in range(3)]),
        ("same", [[None, DIFFER]] * 3),
    ],
)  # fmt: skip
def test_each_function_returns_the_expected_results_on_three_processes(three, name, expected):
    assert [results[name] for results in three[2]] == expected


def test_only_rank_0_prints_and_each_process_exits_with_its_own_code(three):
    ranks, codes, _ = three
    assert [ranks.out(rank) for rank in range(3)] == ["printed by 0\n", "", ""] and codes == [0, 130, 2]


@pytest.mark.skipif(not GLOO_TIMEOUT_CAN_CHANGE, reason="before torch 2.9 Gloo keeps its first timeout")
def test_a_process_that_does_not_answer_within_the_timeout_counts_as_lost(three):
    assert "--process_timeout" in three[2][0]["lost"]


def test_only_errors_of_gloo_and_nccl_mean_a_lost_process(monkeypatch):
    closed = RuntimeError("[gloo/gloo/transport/tcp/pair.cc:546] Connection closed by peer [10.0.0.2]:41873")
    assert processes.lost_process(closed) is None  # a single process can't lose another one
    monkeypatch.setattr(processes, "process_group", lambda: dist)
    assert "[10.0.0.2]:41873" in processes.lost_process(closed)
    assert processes.lost_process(dist.DistBackendError("NCCL error: remote process exited"))
    assert processes.lost_process(RuntimeError("shapes do not match")) is None


def test_processes_that_cannot_connect_get_a_one_line_error(monkeypatch, capsys):
    """Nothing listens on the address of rank 0."""
    monkeypatch.setattr(PPOConfig, "process_timeout", 0.5)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--preset", "demo"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"train_ppo.py: error: host {socket.gethostname()}: ") and "GLOO_SOCKET_IFNAME" in last
    assert "Error: " in last  # torch's own reason


def test_output_is_line_buffered_and_a_closed_pipe_does_not_stop_the_program():
    script = (
        "import sys; from support.run.streams import hold_streams; hold_streams()\n"
        "print('first'); sys.stdin.readline()\n"
        "print('感觉', end='', flush=True); print('more\\n' * 10000)\n"
        "sys.exit(7)\n"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="ascii")
    pipes["env"] = os.environ | {"PYTHONIOENCODING": "ascii"}  # like a console that can't print Chinese
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "" and process.wait(60) == 7
