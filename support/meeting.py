"""How the processes of a run find one another, with NCCL between GPUs and Gloo between CPUs, and what is said when one
of them is gone or ends."""

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
from datetime import timedelta
from pathlib import Path

from config import PPOConfig
from support.collectives import all_reduce_max, process_group
from support.errors import UserError

# ----------------------------------------------------------------------------------------------
# What torchrun says


restarts_seen = 0  # by any process of the group: a machine that joins later has seen none itself


def restart_count() -> int:
    """How often torchrun has started the run's processes anew because one of them had died."""
    return max(restarts_seen, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def below_torchrun() -> bool:
    """Whether torchrun has started this process, be it the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def job() -> str | None:
    """torchrun's --rdzv-id, which stays when machines join, leave and come back; None where there is none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


# ----------------------------------------------------------------------------------------------
# Meeting


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
    global restarts_seen
    restarts_seen = all_reduce_max(restart_count())
    if rank:  # libraries print, too
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def set_timeout(seconds: float) -> None:
    """How long a process waits for the others from now on."""
    if process_group():
        # Private, since torch 2.1: the public way wants the time before the command line is known
        process_group().distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


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


# ----------------------------------------------------------------------------------------------
# Parting


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
    """In words: which wait an exception ended, where it says that another process is gone; else None.

    Gloo raises. NCCL's watchdog aborts the process from a thread of its own unless TORCH_NCCL_BLOCKING_WAIT=1 is set.
    """
    if process_group() is None or not isinstance(error, RuntimeError) or not re.search("gloo|NCCL", str(error)):
        return None
    here = Path(__file__)
    folders = (here.parent, here.parent.parent)  # a virtual environment may lie below them
    waits = (here, here.with_name("collectives.py"))  # whoever called these is named
    frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    file, function = [(file, name) for file, name in frames if file.parent in folders and file not in waits][-1]
    address = re.search(r"\[[\d.:a-f]+\]:\d+", str(error))
    how = "has closed its connection"
    if timed_out := re.search(r"(?:[Tt]imed out.*?(?=\d+ ?ms)|Timeout\(ms\)=)(\d+)", str(error)):  # Gloo, NCCL
        how = f"did not answer for {int(timed_out[1]) / 1000:g} s (--process_timeout)"
    who = f"another machine or process{f' ({address[0]})' if address else ''}"
    return f"{who} is gone: it {how}, for which this one waited in {function}() of {file.name}"
