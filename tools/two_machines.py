"""The commands of docs/several_gpus.md between two machines: network namespaces of this one, with a cable between them.

    python -m tools.two_machines [SCENARIO ...] [--hosts good|debian|none]

Each machine has its own address, host name, /etc/hosts and working directory. --hosts: what a machine's own name
resolves to: the cable's address, 127.0.1.1 (Debian's default), or nothing; all three unless given. Prints a line for
each, and for what is not as it should be the machines' last lines too; the exit code is then 1. It needs root and `ip`
(apt-get install iproute2), and says so where they lack.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--preset demo --device cpu --eval_samples 16 --batch_size 16 --minibatch_size 16 --save_every 1 --run_name job"
OPTIONS = "--nnodes 2 --node-rank {rank} --master-addr 10.77.0.1 --master-port 29500"
ELASTIC = "--nnodes 1:2 --max-restarts 3 --rdzv-backend c10d --rdzv-id job --rdzv-endpoint 10.77.0.1:29500"
ELASTIC += " --rdzv-conf is_host={is_host} --local-addr 10.77.0.{number}"
ALONE, TOGETHER = r"\non cpu in float32", "2 processes, each on cpu"
SCENARIOS = {  # the event, each machine's exit code (None: not awaited), what the first one says
    # join: the second machine is started when the first is at work alone; both go on with the same run
    # leave: the second is killed, and started again when the first is at work alone; the same
    "plain": (None, [0, 0], "model, metrics and report.md are in runs/job"),
    "eval_only": ("judge", [0, 0], "mean reward"),
    "kill": (
        "kill",
        [1, None],
        r"is gone: it has closed its connection.*the newest checkpoint is runs/job/checkpoints",
    ),
    "join": ("join", [0, 0], rf"(?s){ALONE}.*{TOGETHER}.*report.md are in runs/job"),
    "leave": ("leave", [0, 0], rf"(?s){TOGETHER}.*{ALONE}.*{TOGETHER}.*report.md are in runs/job"),
    "vanish": ("cut", [1, None], r"is gone: it did not answer for 10 s.*the newest checkpoint is runs/job/checkpoints"),
}


class Machine:
    """A namespace `name` with the address 10.77.0.`number`, whose processes see a /etc/hosts of their own."""

    def __init__(self, number: int, name: str, folder: Path, hosts: str):
        self.number, self.name, self.folder = number, name, folder
        self.folder.mkdir()
        self.process = None
        known = {"good": f"10.77.0.{number} m{number}\n", "debian": f"127.0.1.1 m{number}\n", "none": ""}[hosts]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + known)

    def start(self, flags: str, options: str = OPTIONS) -> None:
        options = options.format(number=self.number, rank=self.number - 1, is_host=int(self.number == 1))
        command = (
            f"{sys.executable} -m torch.distributed.run --nproc-per-node 1 {options} {ROOT / 'train_ppo.py'} {flags}"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        inside = f"hostname m{self.number}; mount --bind hosts /etc/hosts; exec {command}"
        unshare = "unshare --uts --mount --pid --fork --kill-child --mount-proc bash -c".split()
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *unshare, inside],
                cwd=self.folder, stdout=log, stderr=log, env=environment,
            )  # fmt: skip

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def steps(self) -> int:
        metrics = self.folder / "runs" / "job" / "metrics.csv"
        return metrics.read_text().count("\n") - 1 if metrics.exists() else 0

    def wait_for(self, condition) -> None:
        """Two minutes at most, and no longer than the machine's torchrun lives."""
        deadline = time.monotonic() + 120
        while not condition() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the first process of the namespace of processes, and so to all of them at once."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        self.process.wait()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def run(scenario: str, hosts: str, folder: Path) -> list[str]:
    """Run a scenario to its end; what is not as it should be."""
    event, codes, said = SCENARIOS[scenario]
    names = [f"two-{os.getpid()}-{number}" for number in (1, 2)]
    machines = []
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
            machines.append(Machine(number, name, folder / f"m{number}", hosts))
        episodes = {"kill": 16_000, "cut": 16_000, "join": 4_800, "leave": 4_800}.get(event, 64)
        options = ELASTIC if event in ("join", "leave") else OPTIONS
        flags = f"{FLAGS} --process_timeout 10 --episodes {episodes}"
        for machine in machines[:1] if event == "join" else machines:
            machine.start(flags, options)
        if event in ("kill", "cut", "join", "leave"):
            machines[0].wait_for(lambda: machines[0].steps() >= 2)
        if event in ("kill", "leave"):
            machines[1].kill()
        if event == "cut":
            ip("-n", names[1], "link", "set", "cable", "down")
        if event == "leave":
            machines[0].wait_for(lambda: re.search(f"(?s){TOGETHER}.*{ALONE}", machines[0].log()))
        if event in ("join", "leave"):
            machines[1].start(flags, options)
        if event == "judge":
            for machine in machines:
                machine.process.wait(120)
            for machine in machines:
                machine.start("--eval_only runs/job")
        found = []
        for machine, code in zip(machines, codes):
            if code is not None and (got := machine.process.wait(300)) != code:
                found.append(f"machine {machine.number} ended with {got}\n{machine.log()[-3000:]}")
        if not re.search(said, machines[0].log()):
            found.append(f"machine 1 does not say {said!r}\n{machines[0].log()[-3000:]}")
        return found
    except subprocess.TimeoutExpired:
        return [f"machine {machine.number} after its time:\n{machine.log()[-3000:]}" for machine in machines]
    finally:
        for machine in machines:
            if machine.process and machine.process.poll() is None:
                machine.kill()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--hosts", nargs="*", default=["good", "debian", "none"])
    args = parser.parse_args()
    if os.geteuid() or not shutil.which("ip"):
        sys.exit(print("skipped: network namespaces need root and `ip` (apt-get install iproute2)"))
    failed = False
    for scenario in args.scenarios or SCENARIOS:
        for hosts in args.hosts:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                found = run(scenario, hosts, Path(folder))
            failed |= bool(found)
            print(
                f"{scenario}, hosts {hosts}: {time.monotonic() - started:.0f} s,",
                *(found or ["as it should be"]),
                flush=True,
            )
    sys.exit(failed)
