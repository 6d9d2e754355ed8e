"""Several processes: how they find one another and put results together; errors; what is said where one is gone."""

import ctypes
import json
import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch import distributed as dist

from config import PPOConfig
from reward import score_texts
from support import collectives, devices, meeting
from support.errors import UserError
from tests.helpers import ROOT
from tests.ranks import Ranks, agents_store
from train_ppo import main

TIMEOUT_CAN_CHANGE = Version(torch.__version__) >= Version("2.9.0")  # of Gloo, by `meeting.set_timeout`

# ----------------------------------------------------------------------------------------------
# Three processes, the first of them on a machine of its own


def outcome(function, *arguments):
    """What a call returns, or in words what it raises."""
    try:
        return function(*arguments)
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def exchange(rank: int) -> None:
    """What each function gives on each process; to a file."""
    socket.gethostname = lambda: ("gpu-1", "gpu-2", "gpu-2")[rank]
    os.environ["LOCAL_RANK"] = str((0, 0, 1)[rank])
    meeting.init_process_group()
    print("printed by", rank)

    def fails_on(*ranks):
        def function():
            if rank in ranks:
                raise UserError(f"no room for {rank}")
            return rank

        return function

    rows = torch.zeros(5)
    mine = collectives.rows_of_rank(5)
    rows[mine] = torch.arange(1.0, 6.0)[mine]
    tensor = torch.tensor([3.0, 30.0]) * (rank + 1)
    results = {
        "known": (collectives.rank(), collectives.world_size(), meeting.restart_count()),
        "rows": [list(range(n))[collectives.rows_of_rank(n)] for n in (0, 2, 3, 5, 10)],
        "sum": [collectives.all_reduce_sum(rows).tolist(), rows.tolist()],
        "mean": [collectives.all_reduce_mean(tensor).tolist(), tensor.tolist()],
        "max": [collectives.all_reduce_max(number) for number in (rank, -1 - rank, (2, 9, 2)[rank])],
        "gathered": collectives.all_gather({"rank": rank}),
        "broadcast": [
            outcome(collectives.broadcast_from_rank_0, function)
            for function in (lambda: {"rank": rank}, fails_on(0), fails_on(1), lambda: sys.exit(f"help of {rank}"))
        ],
        "all": [outcome(collectives.on_all_ranks, fails_on(*ranks)) for ranks in ((), (0,), (1, 2), (2,), (0, 2))],
    }
    torch_version, numpy_version = ("2.13", "2.13", "2.6")[rank], ("2.1", "1.9", "1.9")[rank]
    values = [{"torch": "2.13"}, {"torch": torch_version}, {"numpy": numpy_version, "torch": torch_version}]
    results["same"] = [outcome(collectives.check_same, each) for each in values]

    model = torch.nn.BatchNorm1d(2)
    model.weight.data[:] = model.running_mean[:] = rank + 1
    collectives.broadcast_weights(model)
    results["weights"] = [model.weight.tolist(), model.running_mean.tolist()]

    def build() -> list[str]:
        built = sorted(path.name for path in Path().glob("built-*"))
        if int(os.environ["LOCAL_RANK"]) == 0:
            time.sleep(0.3)
        Path(f"built-{rank}").touch(exist_ok=False)
        return built

    results["build"] = collectives.local_rank_0_first(build)
    results["build failed"] = outcome(collectives.local_rank_0_first, fails_on(2))

    meeting.set_timeout(1)
    if rank:
        while not Path("given-up").exists():
            time.sleep(0.05)
    elif TIMEOUT_CAN_CHANGE:
        try:
            score_texts(len, ["a", "b", "c"])
        except RuntimeError as error:
            results["lost"] = meeting.lost_process(error)
    Path("given-up").touch()
    torch.save(results, f"{rank}.pt")
    meeting.exit_process((0, 130, 2)[rank])


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[Ranks, list[int], list[dict]]:
    folder = tmp_path_factory.mktemp("three")
    ranks = Ranks(folder, exchange, n=3, store=agents_store())
    codes = ranks.wait()
    return ranks, codes, [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def of(three, name: str) -> list:
    """What each process found."""
    return [results[name] for results in three[2]]


def test_each_process_has_its_number_and_the_first_one_alone_prints(three):
    assert of(three, "known") == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]
    assert [three[0].out(rank) for rank in range(3)] == ["printed by 0\n", "", ""]


def test_each_process_ends_with_the_code_that_it_gives(three):
    assert three[1] == [0, 130, 2]


def test_shares_are_contiguous_and_cover_all_rows_once(three):
    assert of(three, "rows") == [
        [[], [], [0], [0], [0, 1, 2]],
        [[], [0], [1], [1, 2], [3, 4, 5]],
        [[], [1], [2], [3, 4], [6, 7, 8, 9]],
    ]


def test_sum_mean_and_maximum_are_those_over_the_processes(three):
    assert of(three, "sum") == [[[1, 2, 3, 4, 5]] * 2] * 3
    assert of(three, "mean") == [[[6, 60]] * 2] * 3  # of 3, 6, 9 and 30, 60, 90
    assert of(three, "max") == [[2, -1, 9]] * 3


def test_everyones_values_and_weights_come_in_order_of_rank(three):
    assert of(three, "gathered") == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    assert of(three, "weights") == [[[1, 1], [1, 1]]] * 3


def test_what_the_first_process_found_or_raised_all_have(three):
    assert of(three, "broadcast") == [[{"rank": 0}, "UserError: no room for 0", 0, "SystemExit: help of 0"]] * 3


def test_an_error_on_any_process_is_raised_by_all_and_names_the_host_if_it_is_another(three):
    """Of several the first; where none fails each has its own result."""
    first, second = "UserError: no room for 0", "UserError: on host gpu-2: no room for 1"
    third = "UserError: on host gpu-2: no room for 2"
    assert of(three, "all") == [[rank, first, second, third, first] for rank in range(3)]


def test_what_is_not_the_same_everywhere_is_named_with_both_hosts(three):
    def said(name, one, other):
        return f"UserError: {name} is {one} on host gpu-1 and {other} on host gpu-2: all processes need the same"

    assert of(three, "same") == [[None, said("torch", "2.13", "2.6"), said("numpy", "2.1", "1.9")]] * 3


def test_the_first_process_of_each_machine_builds_and_the_others_find(three):
    assert [set(found) & {"built-2"} for found in of(three, "build")] == [set()] * 3
    assert set(of(three, "build")[2]) == {"built-0", "built-1"}
    assert of(three, "build failed") == ["UserError: on host gpu-2: no room for 2"] * 3


@pytest.mark.skipif(not TIMEOUT_CAN_CHANGE, reason="before torch 2.9 Gloo keeps the timeout that it began with")
def test_a_process_that_does_not_answer_is_given_up(three):
    assert re.fullmatch(
        r"another machine or process.* is gone: it did not answer for 1 s \(--process_timeout\), "
        r"for which this one waited in score_texts\(\) of reward\.py",
        three[2][0]["lost"],
    )


# ----------------------------------------------------------------------------------------------
# One process alone


def test_alone_every_function_does_nothing():
    def fails():
        raise UserError("no room")

    tensor = torch.tensor([2.0])
    assert (collectives.rank(), collectives.world_size(), collectives.rows_of_rank(5)) == (0, 1, slice(0, 5))
    assert collectives.all_reduce_sum(tensor) is tensor and collectives.all_reduce_mean(tensor) is tensor
    assert tensor == 2
    assert collectives.all_reduce_max(3) == 3 and collectives.all_gather("a") == ["a"]
    assert collectives.broadcast_from_rank_0(lambda: 5) == collectives.on_all_ranks(lambda: 5) == 5
    assert collectives.local_rank_0_first(lambda: 5) == 5
    for function in (collectives.broadcast_from_rank_0, collectives.on_all_ranks, collectives.local_rank_0_first):
        with pytest.raises(UserError, match="^no room$"):
            function(fails)
    collectives.check_same({"torch": "2.13"})
    meeting.set_timeout(1)
    meeting.init_process_group()
    assert collectives.process_group() is None
    with pytest.raises(SystemExit) as left:
        meeting.exit_process(130)
    assert left.value.code == 130


def test_what_torchrun_says_of_a_job(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (meeting.below_torchrun(), meeting.job(), meeting.restart_count()) == (False, None, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert (meeting.below_torchrun(), meeting.job()) == (True, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert (meeting.below_torchrun(), meeting.job(), meeting.restart_count()) == (True, "job", 2)


def test_large_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    """glibc's mallopt: M_MMAP_MAX 0, M_TRIM_THRESHOLD without end. Other libraries and systems are left alone."""
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *option: asked.append(option)))
    monkeypatch.setattr(sys, "platform", "darwin")
    devices.keep_freed_memory()
    assert asked == []
    monkeypatch.setattr(sys, "platform", "linux")
    devices.keep_freed_memory()
    assert sorted(asked) == [(-4, 0), (-1, -1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    devices.keep_freed_memory()


def test_why_a_process_ends_is_said_once_a_machine_and_to_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    meeting.say_why("the disk is full")
    assert capsys.readouterr() == ("", "train_ppo.py: error: the disk is full\n")
    for local_rank, printed in (("0", "train_ppo.py: error: 磁盘满了\n"), ("1", "")):
        file = tmp_path / f"{local_rank}.json"
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        meeting.say_why("磁盘满了")
        assert capsys.readouterr() == ("", printed)
        said = json.loads(file.read_text(encoding="utf-8"))["message"]
        assert said["message"] == said["extraInfo"]["py_callstack"] == "磁盘满了"
        assert re.fullmatch(r"\d{10}", said["extraInfo"]["timestamp"])


# ----------------------------------------------------------------------------------------------
# A process that is gone

CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:546] Connection closed by peer [10.0.0.2]:41873"
CLOSED_6 = "[../gloo/transport/tcp/pair.cc:546] Connection closed by peer [fd00::2]:41873"
SILENT = "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1500ms for recv operation to complete"
NCCL = "NCCL error: remote process exited or there was a network error"
NCCL_SILENT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=3, "
    "NumelOut=3, Timeout(ms)=2500) ran for 2504 milliseconds before timing out."
)


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def raised_in(*places, error: Exception) -> Exception:
    """An exception that went through functions of these names in these files, the outermost first."""

    def fails():
        raise error

    inner = fails
    for file, name in reversed(places):
        names = {"inner": inner}
        exec(compile(f"def {name}():\n    inner()\n", str(file), "exec"), names)
        inner = names[name]
    with pytest.raises(type(error)) as caught:
        inner()
    caught.value.__traceback__ = caught.tb.tb_next  # begins in the first of these places
    return caught.value


PACKAGES = ["lib/python3.12/site-packages", ".venv/lib/python3.12/site-packages", "runs/env/lib/site-packages"]


@pytest.mark.parametrize("packages", PACKAGES)
def test_the_wait_is_named_by_the_programs_own_function(group, packages):
    """Wherever the libraries are, also in an environment inside the program's folder."""
    library = ROOT / packages / "torch" / "distributed" / "distributed_c10d.py"
    places = [(ROOT / "train_ppo.py", "train"), (ROOT / "ppo.py", "step"), (collectives.__file__, "all_reduce_sum")]
    error = raised_in(*places, (library, "all_reduce"), error=RuntimeError(CLOSED))
    gone = "another machine or process ([10.0.0.2]:41873) is gone: it has closed its connection"
    assert meeting.lost_process(error) == f"{gone}, for which this one waited in step() of ppo.py"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (CLOSED_6, "another machine or process ([fd00::2]:41873) is gone: it has closed its connection"),
        (SILENT, "another machine or process is gone: it did not answer for 1.5 s (--process_timeout)"),
        (NCCL_SILENT, "another machine or process is gone: it did not answer for 2.5 s (--process_timeout)"),
        (NCCL, "another machine or process is gone: it has closed its connection"),
    ],
)
def test_whether_a_process_closed_or_fell_silent_is_said(group, message, said):
    error = raised_in((ROOT / "support" / "evaluation.py", "evaluate"), error=dist.DistBackendError(message))
    assert meeting.lost_process(error) == f"{said}, for which this one waited in evaluate() of evaluation.py"


def test_an_error_that_is_no_loss_is_none(group):
    place = (ROOT / "ppo.py", "step")
    assert meeting.lost_process(raised_in(place, error=RuntimeError("shapes do not match"))) is None
    assert meeting.lost_process(raised_in(place, error=ValueError(CLOSED))) is None


def test_alone_no_process_is_lost():
    assert meeting.lost_process(raised_in((ROOT / "ppo.py", "step"), error=RuntimeError(CLOSED))) is None


# ----------------------------------------------------------------------------------------------
# Finding one another


def test_processes_that_do_not_find_one_another_say_so(monkeypatch, capsys):
    """The first one's store is not there."""
    monkeypatch.setattr(PPOConfig, "process_timeout", 0.5)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-2")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(nobody.getsockname()[1])}
        for name, value in {**address, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        assert main(["--preset", "demo"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"train_ppo.py: error: host gpu-2: the processes did not find one another \(\w.+\)", said)


def test_all_processes_of_a_start_agree_on_a_prefix_and_later_ones_on_another(tmp_path):
    """In torchrun's store, which still holds the keys of an earlier start; the others come before the first."""
    stores = [dist.FileStore(str(tmp_path / "store"), 3) for _ in range(3)]
    for store in stores:
        store.set_timeout(timedelta(seconds=60))
    prefixes = []
    for _ in range(2):
        with ThreadPoolExecutor() as threads:
            others = [threads.submit(meeting.agree_on_prefix, stores[rank], rank, 3) for rank in (1, 2)]
            time.sleep(0.2)
            prefixes.append(meeting.agree_on_prefix(stores[0], 0, 3))
            assert [other.result(60) for other in others] == [prefixes[-1]] * 2
    assert prefixes[0] != prefixes[1]


@pytest.mark.parametrize("confirmed", [True, False])
def test_an_offer_of_an_earlier_start_is_waited_out(monkeypatch, confirmed):
    """Also of one whose first process died before it had confirmed the answers."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    store.set("offer", "old")
    if confirmed:
        store.set("old-confirmed", "one-of-then another-of-then")
    monkeypatch.setattr(PPOConfig, "process_timeout", 0.2)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-2")
    with pytest.raises(UserError, match=r"^host gpu-2: the first process did not come in 0\.2 s$"):
        meeting.agree_on_prefix(store, 1, 3)


@pytest.fixture
def no_interface(monkeypatch):
    """The environment without a chosen interface, now and afterwards."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("master", "peers", "expected"),
    [
        ("10.0.0.1", [""], "eth0"),
        ("10.0.0.1", ["10.1.0.2"], "eth0"),  # which another way leads to
        ("127.0.1.1", ["10.0.0.2"], "eth0"),  # as on the machine of MASTER_ADDR, whose name may mean a loopback address
        ("127.0.1.1", ["", "127.0.0.1", "10.0.0.2"], "eth0"),
        ("127.0.0.1", ["127.0.0.1"], "lo"),
    ],
)
def test_gloo_and_nccl_take_the_interface_that_leads_to_the_other_machine(
    master, peers, expected, no_interface, monkeypatch
):
    store = dist.HashStore()
    for other, address in enumerate(peers):
        store.set(f"address-{other}", address)
    monkeypatch.setenv("MASTER_ADDR", master)
    ways = {"10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.1", "127.0.1.1": "127.0.1.1", "127.0.0.1": "127.0.0.1"}
    ways["10.1.0.2"] = "10.1.0.1"
    monkeypatch.setattr(meeting, "local_address", ways.get)
    monkeypatch.setattr(
        meeting, "interface_of", {"10.0.0.1": "eth0", "10.1.0.1": "eth1", "127.0.0.1": "lo", "127.0.1.1": "lo"}.get
    )
    meeting.choose_interface(store, len(peers), len(peers) + 1)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (expected, f"={expected}")
    assert store.get(f"address-{len(peers)}").decode() == ways[master]  # for the others to see


def test_an_interface_that_the_user_chose_stays(no_interface, monkeypatch):
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr(meeting, "local_address", lambda host: pytest.fail("looked for another"))
    meeting.choose_interface(store, 1, 2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and "NCCL_SOCKET_IFNAME" not in os.environ
    assert store.get("address-1") == b""  # the others do not wait for it


def test_an_nccl_interface_that_the_user_chose_stays(no_interface, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    meeting.choose_interface(dist.HashStore(), 0, 1)
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0") and os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_an_interface_is_found_by_its_address_or_the_user_is_told(no_interface, monkeypatch):
    assert meeting.interface_of(meeting.local_address("127.0.0.1")) in ("lo", "lo0")
    assert meeting.interface_of("192.0.2.1") is None  # of documentation, RFC 5737
    assert meeting.interface_of("2001:db8::1%eth0") is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(meeting, "local_address", lambda host: "192.0.2.1")
    with pytest.raises(UserError, match="no network interface has the address 192.0.2.1; set GLOO_SOCKET_IFNAME"):
        meeting.choose_interface(dist.HashStore(), 0, 1)


def test_a_host_that_no_way_leads_to_is_named(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-2")
    with pytest.raises(UserError, match=r"^host gpu-2: no way to gpu-1 \(Name or .* known\); set GLOO_SOCKET_IFNAME"):
        meeting.local_address("gpu-1")


def test_loopback_addresses_are_known_in_both_families():
    addresses = ["127.0.0.1", "127.0.1.1", "::1", "10.0.0.1", "fe80::1%eth0"]
    assert [meeting.is_loopback(address) for address in addresses] == [True, True, True, False, False]
