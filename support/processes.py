"""One run on several processes, with torch.distributed: NCCL between GPUs, Gloo between CPUs.

Every process holds the whole batch, which is small, and takes its own rows of it through the models, which is the
work. `all_reduce_sum` puts the rows together, so that everything after it (rewards, advantages, whitening, statistics)
is computed by every process alike, from the whole batch. Gradients are averaged by DistributedDataParallel. In a
process that is alone every function here does nothing.
"""

import ctypes
import ipaddress
import json
import os
import re
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from config import PPOConfig, UserError


def process_group():
    """torch.distributed where this process is one of several, else None. Imports nothing."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    return process_group().get_rank() if process_group() else 0


def world_size() -> int:
    return process_group().get_world_size() if process_group() else 1


def restart_count() -> int:
    """How often torchrun has started the run's processes anew because one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def below_torchrun() -> bool:
    """Whether torchrun has started this process, be it the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def job() -> str | None:
    """torchrun's --rdzv-id, which stays when machines join, leave and come back; None where there is none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def init_process_group() -> None:
    """Enter the group that torchrun's environment variables describe, if they do. From here on rank 0 alone prints.

    UserError where the processes do not find one another.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=PPOConfig.process_timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(agree_on_prefix(store, rank, world_size), store)
        if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
            choose_interface(store, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"host {socket.gethostname()}: the processes did not find one another ({reason})")
    restarts = all_reduce_max(restart_count())  # of which a machine that joins later has seen none
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def agree_on_prefix(store, rank: int, world_size: int) -> str:
    """A prefix for the keys of this start, the same on all processes and on no earlier start.

    torchrun's store may still hold the addresses of dead processes, and how often a process was started is not the same
    on all machines. Rank 0 offers a name, each other process answers it with a name of its own, and rank 0 confirms the
    answers. The offer of an earlier start confirms other names, and is passed over.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        store.set("offer", name)
        answers = [store.get(f"{name}-{other}").decode() for other in range(1, world_size)]
        store.set(f"{name}-confirmed", " ".join(answers))
        return name
    deadline = time.monotonic() + PPOConfig.process_timeout
    while time.monotonic() < deadline:
        offer = store.get("offer").decode()
        store.set(f"{offer}-{rank}", name)
        if store.check([f"{offer}-confirmed"]) and name in store.get(f"{offer}-confirmed").decode().split():
            return offer
        time.sleep(0.05)
    raise UserError(f"host {socket.gethostname()}: the first process did not come in {PPOConfig.process_timeout:g} s")


def choose_interface(store, rank: int, world_size: int) -> None:
    """Have Gloo and NCCL use the network interface that leads to the other machines, unless the user has chosen one.

    Gloo would take the address that this machine's own name resolves to, which on Debian is a loopback address and on
    others none. The interface is that of the way to MASTER_ADDR or, where that name is a loopback address here, of the
    way to another process. UserError where it cannot be found.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        store.set(f"address-{rank}", "")
        return
    address = local_address(os.environ["MASTER_ADDR"])
    store.set(f"address-{rank}", address)
    others = (store.get(f"address-{other}").decode() for other in range(world_size))
    if is_loopback(address) and (other := next((other for other in others if other and not is_loopback(other)), None)):
        address = local_address(other)
    if not (name := interface_of(address)):
        hint = "set GLOO_SOCKET_IFNAME to that between the machines"
        raise UserError(f"host {socket.gethostname()}: no network interface has the address {address}; {hint}")
    os.environ["GLOO_SOCKET_IFNAME"] = name
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # '=': no other whose name begins so


def local_address(host: str) -> str:
    """The address of this machine on the way to a host. Nothing is sent. UserError where no way leads there."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        hint = "set GLOO_SOCKET_IFNAME to the network interface between the machines"
        raise UserError(f"host {socket.gethostname()}: no way to {host} ({error.strerror}); {hint}")


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the network interface with an address: the system's getifaddrs(), which Python does not offer."""

    class Entry(ctypes.Structure):
        pass

    Entry._fields_ = [
        ("next", ctypes.POINTER(Entry)),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
    ]
    address = ipaddress.ip_address(address.partition("%")[0])
    family, start = (socket.AF_INET, 4) if address.version == 4 else (socket.AF_INET6, 8)  # as in a sockaddr
    libc, first = ctypes.CDLL(None), ctypes.POINTER(Entry)()
    libc.getifaddrs(ctypes.byref(first))
    entry, name = first, None
    while entry and name is None:
        found = entry.contents
        if found.address and family in ctypes.string_at(found.address, 2):
            if ctypes.string_at(found.address + start, len(address.packed)) == address.packed:
                name = found.name.decode()
        entry = found.next
    libc.freeifaddrs(first)
    return name


def set_timeout(seconds: float) -> None:
    """How long a process waits for the others from now on."""
    if process_group():
        process_group().distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def exit_process(code: int) -> None:
    """End this process with an exit code. One of several does so at once: while Python takes itself down, the group's
    threads may abort or hang a process whose work is done."""
    if process_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def say_why(line: str) -> None:
    """Say in one line why this process ends: on the screen, once a machine, and in torchrun's report."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"train_ppo.py: error: {line}", file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def lost_process(error: Exception) -> str | None:
    """In words: which wait an exception ended, where it says that another process is gone; else None."""
    if process_group() is None or not isinstance(error, RuntimeError) or not re.search("gloo|NCCL", str(error)):
        return None
    here = Path(__file__)
    folders = (here.parent, here.parent.parent)  # a virtual environment may lie below them
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != str(here)]
    own = [frame for frame in frames if Path(frame.filename).parent in folders][-1]
    address = re.search(r"\[[\d.:a-f]+\]:\d+", str(error))
    how = "has closed its connection"
    if timed_out := re.search(r"[Tt]imed out.*?(\d+) ?ms", str(error)):
        how = f"did not answer for {int(timed_out[1]) / 1000:g} s (--process_timeout)"
    who = f"another machine or process{f' ({address[0]})' if address else ''}"
    return f"{who} is gone: it {how}, for which this one waited in {own.name}() of {Path(own.filename).name}"


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks. It hands them back otherwise, and each tensor of logits would come in anew,
    page fault by page fault: a sixth of a step on a CPU (docs/speed.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


# ----------------------------------------------------------------------------------------------
# The batch and its gradient


def rows_of_rank(n: int) -> slice:
    """The rows, of n, that are this process's work: a contiguous part, parts differing by one row at most."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_reduce_sum(rows):
    """A tensor's sum over the processes, in place. Where each filled its `rows_of_rank` only, all rows are filled."""
    if process_group():
        process_group().all_reduce(rows)
    return rows


def all_reduce_mean(tensor):
    """A tensor's mean over the processes, in place."""
    if process_group():
        process_group().all_reduce(tensor.div_(world_size()))
    return tensor


# ----------------------------------------------------------------------------------------------
# Results and errors


def broadcast_from_rank_0(function: Callable):
    """function() as rank 0 computed it, on every process. Where it raises UserError or SystemExit, all raise that."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome = [function(), None]
        except (UserError, SystemExit) as error:
            outcome = [None, error]
    if process_group():
        process_group().broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_all_ranks(function: Callable):
    """function(), run by every process for itself. Where it raises UserError on any, all raise the first of them.

    A message from another machine than rank 0's says from which.
    """
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    outcomes = all_gather((error, socket.gethostname()))
    for error, host in outcomes:
        if error is not None and host != outcomes[0][1]:
            error.args = (f"on host {host}: {error}", *error.args[1:])
        if error is not None:
            raise error
    return result


def check_same(values: dict[str, str]) -> None:
    """UserError, on all processes, where a value is not that of rank 0."""
    everyone = all_gather((values, socket.gethostname()))
    expected, first_host = everyone[0]
    for found, host in everyone:
        for name, value in expected.items():
            if found[name] != value:
                difference = f"{name} is {value} on host {first_host} and {found[name]} on host {host}"
                raise UserError(f"{difference}: all processes need the same")


def local_rank_0_first(function: Callable):
    """function() on one process of each machine, then on the others, which find what it fetched or built."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = on_all_ranks(lambda: function() if first else None)
    return on_all_ranks(lambda: result if first else function())


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if process_group() is None:
        return number
    import torch

    largest = torch.tensor(number)
    process_group().all_reduce(largest, process_group().ReduceOp.MAX)
    return int(largest)


def all_gather(value) -> list:
    """Every process's value, by rank."""
    values = [value] * world_size()
    if process_group():
        process_group().all_gather_object(values, value)
    return values


def broadcast_weights(model) -> None:
    """Give a model rank 0's weights, in place."""
    for tensor in model.state_dict().values():
        process_group().broadcast(tensor, 0)
