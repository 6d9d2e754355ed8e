"""Commands as a person types them: a shell whose `python` and `hf` are forked from a process that has the libraries.

What each would take seconds to import is there once. A run is made small by flags at its end, and draws no picture.
"""

import importlib
import json
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import entry_points
from pathlib import Path

from tests.helpers import ROOT
from tests.ranks import context

CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [1, 2])
    server.sendall(request)
    sys.exit(int(server.recv(9)))
"""
SMALL = "--device cpu --episodes 32 --batch_size 16 --minibatch_size 16 --eval_samples 64".split()
LONGER = "--episodes 48".split()  # than that, for a run that goes on
TINY = {  # of a module that is run, constants that make it quick
    "tools.review_models": {
        "GPT2_SIZES": {"n_embd": 32, "n_layer": 3, "n_head": 2},
        "CLASSIFIER_SIZES": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64},
    }
}


class Shell:
    """`folder` becomes the current one, with the programs of this repository in it."""

    def __init__(self, folder: Path, **environment: str):
        self.folder = folder
        for program in ("train_ppo.py", "plot_rewards.py"):
            (folder / program).symlink_to(ROOT / program)
        self.programs = programs = Path(tempfile.mkdtemp())  # a short path, as a socket needs it
        address = str(programs / "socket")
        for name in ("python", "hf"):
            client = CLIENT.format(address=address, program=name)
            (programs / f"{name}.py").write_text(client)
            (programs / name).write_text(
                f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {programs / name}.py "$@"\n'
            )
            (programs / name).chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.environment |= {"PATH": f"{programs}:{os.environ['PATH']}", **environment}
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        self.server = context.Process(target=serve, args=(listener,))
        self.server.start()
        listener.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.kill()
        self.server.join()
        shutil.rmtree(self.programs)

    def type(self, lines: str, **environment: str) -> str:
        """What these lines print; an AssertionError with it where one of them fails."""
        typed = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            timeout=300,
        )
        assert typed.returncode == 0, f"{lines}\n{typed.stdout}"
        return typed.stdout


def serve(listener: socket.socket) -> None:
    """One program after the other, each in a process of its own."""
    while True:
        client, _ = listener.accept()
        with client:
            size, streams, *_ = socket.recv_fds(client, 4, 2)
            request = b""
            while len(request) < int.from_bytes(size, "big"):
                request += client.recv(1 << 16)
            child = os.fork()
            if child == 0:
                for stream, number in zip(streams, (1, 2)):
                    os.dup2(stream, number)
                os._exit(call(*json.loads(request)))
            for stream in streams:
                os.close(stream)
            client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def call(program: str, arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    from huggingface_hub import constants

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(constants)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.path.insert(0, folder)
    try:
        if program == "hf":
            sys.argv = ["hf", *arguments]
            (command,) = entry_points(group="console_scripts", name="hf")
            command.load()()
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            module = importlib.import_module(arguments[1])
            for name, value in TINY[arguments[1]].items():
                setattr(module, name, getattr(module, name) | value)
            module.main()
        else:
            sys.argv = arguments + small(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def small(arguments: list[str]) -> list[str]:
    """What makes a run of train_ppo.py small, where one starts or goes on."""
    if arguments[0] != "train_ppo.py" or {"--help", "--complete"} & set(arguments):
        return []
    from support import run_folder

    run_folder.draw = lambda runs, out: out.touch()
    if "--eval_only" in arguments:
        return ["--eval_samples", "128"]
    return LONGER if "--resume" in arguments else SMALL
