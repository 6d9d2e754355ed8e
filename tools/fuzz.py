"""Damage files of a run at random, start the programs on them, and see that none falls over and nothing more is harmed.

    python -m tools.fuzz [--minutes 10] [--first 1]     case after case, each decided by its number
    python -m tools.fuzz --seed 4711                    that case again, with all that it prints

A case does one thing or two to the files of a finished run, of one that was killed, to their models, or to a reward
function, and starts train_ppo.py or plot_rewards.py, in a process of its own with 4 GiB of memory and, after 20 s of
work, Ctrl-C. Then must hold:

- the exit code is 0; or 2, with one line that begins with `PROGRAM: error: ` and is the last; or 130 after Ctrl-C;
- no traceback was printed;
- each file that was whole is whole: JSON and logs can be read, weights and pictures open, a checkpoint has its hashes;
- no file is gone but checkpoints, of which a whole one is left if there was any, and report.md, made at the end;
- models, and runs that the command does not name, are as they were; logs that nothing was done to begin with step 1.

Prints a line for each case in which one of these does not hold; exit code 1 if there was any. Needs fork(), as Linux
and macOS have it.
"""

import argparse
import collections
import hashlib
import importlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}

import torch
from safetensors.torch import load_file, save_file

import plot_rewards
import train_ppo
from support.checkpoint import FILES, read_state, sha256
from support.compare import read_rows
from support.demo_models import demo_models
from support.streams import hold_streams

SECONDS, KILLED_AFTER, MEMORY = 20, 600, 4 << 30
LOADED = "matplotlib.pyplot support.run_folder support.text_trainer support.load transformers.pipelines".split()
LOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bert")]
SMALL = "--preset demo --device cpu --model_name gpt2 --reward_model_name sentiment --runs_dir . --eval_samples 4"
SMALL += " --episodes 6 --batch_size 2 --minibatch_size 2 --save_every 1 --gen_len 4"
COMMANDS = [  # (program, flags, what they read)
    (train_ppo, "--resume killed", "killed"),
    (train_ppo, "--resume finished --episodes 8", "finished"),
    (train_ppo, "--eval_only finished", "finished"),
    (plot_rewards, "finished", "finished"),
    (plot_rewards, "killed finished --out both.png", "killed"),
    (train_ppo, f"{SMALL} --run_name new --episodes 2 --reward odd:score", "odd.py"),
    (train_ppo, f"{SMALL} --run_name new --episodes 2 --prompts_file prompts.txt", "prompts.txt"),
    (train_ppo, f"{SMALL} --run_name new --episodes 2", "gpt2"),
    (train_ppo, f"{SMALL} --run_name new --episodes 2", "sentiment"),
]
ODD = [None, True, -1, 0, 3, 0.5, 2.0, 1e308, float("inf"), float("nan"), 2**31, 10**30, 10**400]
ODD += ["", "x", "0.5", "\0", "\x1b[2J", "\ud800", "../..", "/dev/zero", "好" * 500, [], [[]], {}, {"x": 1}, "@deep@"]
RETURNS = """[0.5] * n; [text.count("好") for text in texts]; []; None; [0.5]; 0.5; "0.5"; ["0.5"] * n; [None] * n;
    [[0.5]] * n; [[0.5, 1]] * n; [True] * n; input(); [float("nan")] * n; [1e300] * n; [10**400] * n;
    {text: 1 for text in texts}; (0.5 for text in texts); texts; open; score; (1 / 0 for text in texts);
    torch.ones(n); torch.ones(n, 1, requires_grad=True); torch.ones(()); torch.ones(n, dtype=torch.complex64);
    np.ones(n, "f2"); np.array(["a"] * n); sys.exit(); np.array([Decimal("0.5")] * n); sys.exit("bye"); 1 / 0;
    score(texts); [lambda: 1] * n; torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64);
    os.chdir("/"); texts.clear(); os.abort; exec("raise Exception('a\\\\nb')"); exec("raise BaseException");
    exec("raise KeyboardInterrupt"); sys.argv.clear(); exec("raise SystemExit(0)"); exec("raise StopIteration");
    exec("raise MemoryError"); exec("raise GeneratorExit"); print("hello\\x1b[2J") or [0.5] * n;
    random.seed(0) or [0.5] * n; sys.modules.clear() or [0.5]"""
HEAD = "import sys, os, random, torch, numpy as np\nfrom decimal import Decimal\n"
SOURCES = [  # of a reward function; the first one's RETURNS is one of those
    f"{HEAD}def score(texts):\n    n = len(texts)\n    return RETURNS\n",
    "def score(texts) return 1\n",
    "import sys; sys.exit()\n",
    "raise KeyboardInterrupt\n",
    "score = 1\n",
    "\0",
    "",
    "async def score(texts): return [0.5] * len(texts)\n",
    "def score(): return []\n",
    "import nothing\n",
    "import argparse; argparse.ArgumentParser().parse_args(['--x'])\n",
    "class score: pass\n",
]
MAY_VANISH = {"report.md", ".lock"}  # the end of a run takes the first away before it makes its own


# ----------------------------------------------------------------------------------------------
# Damage


def damage(path: Path, rng: random.Random, place: Path) -> str:
    """Do something to a file, in the manner of its kind or of a bad disk; in words, what."""
    kinds = {".json": damage_json, ".jsonl": damage_lines, ".csv": damage_lines, ".safetensors": damage_weights}
    kinds |= {".pt": damage_weights, ".bin": damage_weights, ".py": damage_reward}
    way = kinds[path.suffix] if path.suffix in kinds and rng.random() < 0.7 else damage_bytes
    try:
        said = way(path, rng)
    except Exception:  # what was done before left nothing of its kind to change
        said = damage_bytes(path, rng)
    state = path.with_name("state.json")
    if path.name in FILES and path.is_file() and state.is_file() and rng.random() < 0.7:  # past the check of hashes
        try:
            values = json.loads(state.read_text())
            values["sha256"][path.name] = sha256(path)
            state.write_text(json.dumps(values))
            said += ", with its hash"
        except (ValueError, TypeError, KeyError):
            pass
    return f"{path.relative_to(place)}: {said}"


def damage_bytes(path: Path, rng: random.Random) -> str:
    data = path.read_bytes() if path.is_file() else b""
    at, till = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    noise = rng.randbytes(rng.choice([1, 8, 1000]))
    others = [other for other in path.parent.rglob("*") if other.is_file()]
    ways = {
        "cut": data[:at],
        "empty": b"",
        "its start is gone": data[at:],
        "a hole": data[:at] + data[till:],
        "zeros": data[:at] + bytes(till - at) + data[till:],
        "noise put in": data[:at] + noise + data[at:],
        "noise over it": data[:at] + noise + data[at + len(noise) :],
        "a bit flipped": data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        if at < len(data)
        else b"",
        "a part twice": data[:till] + data[at:],
        "a mark put before it": rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"# note\n", b"\0"]) + data,
        "its lines end otherwise": data.replace(b"\r\n", b"\n").replace(b"\n", rng.choice([b"\n", b"\r", b"\r\n"])),
        "another file": rng.choice(others).read_bytes() if others else b"",
        "a folder": None,
        "a link to nowhere": None,
        "gone": None,
    }
    way = rng.choice(list(ways))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if way == "a folder":
        path.mkdir()
    elif way == "a link to nowhere":
        path.symlink_to("nowhere")
    elif way != "gone":
        path.write_bytes(ways[way])
    return way


def spots(value) -> list[tuple]:
    """Every (container, key) within nested dicts and lists."""
    items = (
        list(value.items() if isinstance(value, dict) else enumerate(value)) if isinstance(value, (dict, list)) else []
    )
    return [(value, key) for key, _ in items] + [spot for _, item in items for spot in spots(item)]


def change_value(value, rng: random.Random) -> str:
    """Change something within nested dicts and lists, in place."""
    container, key = rng.choice(spots(value))
    way = rng.choice(["odd", "odd", "odd", "gone", "wrapped", "swapped", "twice"])
    old = repr(container[key])[:20]
    if way == "gone":
        del container[key]
    elif way == "odd":
        container[key] = rng.choice(ODD)
        return f"{key!r} is {str(container[key])[:20]!r}"
    elif way == "wrapped":
        container[key] = rng.choice([[container[key]], {str(key): container[key]}])
    elif way == "swapped":
        other, its = rng.choice(spots(value))
        container[key], other[its] = other[its], container[key]
    elif isinstance(container, list):
        container.append(container[key])
    else:
        container["twice"] = container[key]
    return f"{key!r} ({old}) {way}"


def damage_json(path: Path, rng: random.Random) -> str:
    value = [json.loads(path.read_text(encoding="utf-8"))]
    said = change_value(value, rng)
    text = json.dumps(value[0] if value else None, ensure_ascii=True)
    deep = rng.choice(["[" * 20_000 + "]" * 20_000, '{"a":' * 20_000, "[" * 20_000])
    path.write_text(text.replace('"@deep@"', deep))
    return said


def damage_lines(path: Path, rng: random.Random) -> str:
    """Of a log: a line, a cell, a column, or all as a spreadsheet may save it."""
    text = path.read_bytes().decode()
    lines = text.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    cells = lines[i].rstrip().split(",")
    way = rng.choice(
        ["line gone", "line twice", "lines swapped", "other line", "cell", "column gone", "separator", "head"]
    )
    if way == "line gone":
        del lines[i]
    elif way == "line twice":
        lines.insert(i, lines[i])
    elif way == "lines swapped":
        rng.shuffle(lines)
    elif way == "other line":
        lines[i] = rng.choice(["# note", "", "null", "1", "[]", '{"step": "1"}', '{"step": 1e999}', "\0", ",,,"]) + "\n"
    elif way == "head":
        del lines[1:]
    elif way == "column gone":
        at = rng.randrange(len(cells))
        lines = [",".join(line.split(",")[:at] + line.split(",")[at + 1 :]) for line in lines]
    elif way == "separator":
        separator, point = rng.choice([(";", "."), (";", ","), ("\t", "."), (", ", "."), ('","', ".")])
        lines = [line.replace(".", point).replace(",", separator) for line in lines]
    else:
        cells[rng.randrange(len(cells))] = rng.choice(
            ["", "x", "nan", "1e999", "-1", "1e30", "0,5", "感", "\0", "\u2028"]
        )
        lines[i] = ",".join(cells) + "\r\n"
    path.write_bytes("".join(lines).encode())
    return f"{way} ({i + 1})"


def damage_weights(path: Path, rng: random.Random) -> str:
    """A value inside a file of weights or of torch's; a header of safetensors that lies."""
    if path.suffix != ".safetensors":
        value = [torch.load(path, weights_only=True)]
        said = rng.choice([change_tensor, change_value])(value, rng)
        torch.save(value[0] if value else None, path)
    elif rng.random() < 0.5:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if rng.random() < 0.3:
            said, head, claimed = (
                "the length of the header",
                data[8 : 8 + length],
                rng.choice([0, 2**63, length + 1, 7]),
            )
        else:
            header = json.loads(data[8 : 8 + length])
            said, head = change_value(header, rng), json.dumps(header).replace('"@deep@"', "[" * 20_000).encode()
            claimed = len(head)
        path.write_bytes(claimed.to_bytes(8, "little") + head + data[8 + length :])
    else:
        value = load_file(path)
        said = change_tensor(value, rng)
        save_file({name: tensor.contiguous() for name, tensor in value.items()}, path, {"format": "pt"})
    return said


def change_tensor(value, rng: random.Random) -> str:
    container, key = rng.choice([(c, k) for c, k in spots(value) if isinstance(c[k], torch.Tensor)])
    tensor = container[key]
    ways = {
        "NaN": lambda: tensor * torch.nan,
        "huge": lambda: tensor.float() + 1e38,
        "flat": lambda: tensor.flatten()[: rng.randrange(tensor.numel() + 1)],
        "one more dimension": lambda: tensor[None].clone(),
        "turned": lambda: tensor.movedim(0, -1).clone(),
        "float64": lambda: tensor.double(),
        "int64": lambda: tensor.long(),
        "bool": lambda: tensor.bool(),
        "empty": lambda: torch.zeros(0),
        "scalar": lambda: torch.tensor(1.0),
    }
    way = rng.choice([*ways, "gone"])
    if way == "gone":
        del container[key]
    else:
        container[key] = ways[way]()
    return f"{key!r} {way}"


def damage_reward(path: Path, rng: random.Random) -> str:
    returns = rng.choice([part.strip() for part in RETURNS.split(";")])
    source = rng.choice([SOURCES[0]] * 15 + SOURCES).replace("RETURNS", returns)
    path.write_text(source)
    return repr(source.splitlines()[-1:])


# ----------------------------------------------------------------------------------------------
# A case


def start(program, flags: str, place: Path, streams: tuple[Path, Path]) -> int:
    """Start a program in a process of its own; its exit code, negative where a signal killed it."""
    process = os.fork()
    if not process:
        try:
            os.chdir(place)
            sys.path.append(str(place))
            for descriptor, path in enumerate((os.devnull, *streams)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), descriptor)
            # RLIMIT_AS would count the libraries' files: 4.6 GiB of torch 2.9.1 for CUDA before anything is done
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS / 2)
            sys.stdin, sys.stdout, sys.stderr = (open(descriptor, mode) for descriptor, mode in enumerate("rww"))
            hold_streams()
            code = 1
            try:
                code = program.main(shlex.split(flags))
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 99)
    since = time.monotonic()
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() - since > KILLED_AFTER:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def is_whole(path: Path) -> bool:
    try:
        if path.name == "state.json":
            read_state(path.parent)
        elif path.name == "metrics.csv":
            read_rows(path)
        elif path.suffix in (".json", ".jsonl"):
            for text in path.read_bytes().split(b"\n")[:-1] if path.suffix == ".jsonl" else [path.read_bytes()]:
                json.loads(text)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix in (".pt", ".bin"):
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            return path.read_bytes()[:4] == b"\x89PNG" and b"IEND" in path.read_bytes()[-20:]
    except Exception:
        return False
    return not path.name.startswith(".partial")


def survey(place: Path) -> dict[Path, tuple[bool, str]]:
    """Of every file: whether it is whole, and its hash."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(place): (is_whole(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def complaints(files: Path, before: dict, after: dict, flags: str, place: Path) -> list[str]:
    """What a command has done to the files of a case, damaged copies of `files`, and should not have."""
    found = [
        f"{path} is no longer whole" for path, (whole, _) in before.items() if whole and not after.get(path, (1,))[0]
    ]
    found += [f"{path} is left, and not whole" for path in set(after) - set(before) if not after[path][0]]
    for path in set(before) - set(after):
        if "checkpoints" not in path.parts and path.name not in MAY_VANISH and not path.name.startswith(".partial"):
            found.append(f"{path} is gone")
    for path in set(before) & set(after):
        if path.parts[0] not in flags.split() and before[path][1] != after[path][1]:
            found.append(f"{path} has changed, and is none of this command's")
    for run in ("killed", "finished"):
        was, left = (
            [whole for path, (whole, _) in files.items() if path.match(f"{run}/checkpoints/*/state.json")]
            for files in (before, after)
        )
        if any(was) and not any(left):
            found.append(f"{run} has no whole checkpoint any more")
        for log in ("metrics.csv", "samples.jsonl"):
            path, content = Path(run, log), (files / run / log).read_bytes()
            untouched = before.get(path, (0, ""))[1] == hashlib.sha256(content).hexdigest()
            if untouched and not (place / path).read_bytes().startswith(b"".join(content.splitlines(True)[:2])):
                found.append(f"{path} no longer begins with step 1")
    return found


def try_case(seed: int, files: Path, loud: bool = False) -> tuple[str, str, list[str]]:
    """What was done, how it ended, and what should not have happened."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        shutil.copytree(files, place)
        program, flags, target = rng.choice(COMMANDS)
        targets = [
            path for path in [place / target, *(place / target).rglob("*")] if path.is_file() and path.name != ".lock"
        ]
        by_kind = collections.defaultdict(list)
        for path in targets:
            by_kind[path.name].append(path)
        done = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            done.append(damage(rng.choice(by_kind[rng.choice(sorted(by_kind))]), rng, place))
        name = program.__name__
        before = survey(place)
        streams = Path(folder) / "out", Path(folder) / "err"
        code = start(program, flags, place, streams)
        out, err = (path.read_bytes().decode(errors="replace") for path in streams)
        wrong = complaints(files, before, survey(place), flags, place)
        errors = [line for line in err.splitlines() if f"{name}.py: error: " in line]
        if code not in (0, 2, 130):
            wrong.append(f"exit code {code}")
        if "Traceback (most recent" in out + err:
            wrong.append(f"traceback: {err.strip().splitlines()[-1][:200]}")
        elif code == 2 and (len(errors) != 1 or err.splitlines()[-1] != errors[0]):
            wrong.append(f"{len(errors)} error lines, and the last line is {err.splitlines()[-1:]}")
        elif code == 0 and errors:
            wrong.append(f"exit code 0 after {errors}")
        if loud:
            print(out, err, sep="\n")
    ended = errors[-1] if errors else {0: "went on", 130: "stopped"}.get(code, "")
    return f"{name}.py {flags.replace(SMALL, '...')} | {'; '.join(done)}", ended, wrong


def make_files(place: Path) -> None:
    """Two small models, a finished run, the same as killed after its second step's checkpoint, a reward and prompts."""
    for model in demo_models():
        shutil.copytree(model, place / model.name)
    streams = place.with_name("out"), place.with_name("err")
    if start(train_ppo, f"{SMALL} --run_name finished", place, streams):
        sys.exit(f"no run to begin with: {streams[1].read_text()}")
    killed = shutil.copytree(place / "finished", place / "killed")
    for name in ("model", "checkpoints/step-000003"):
        shutil.rmtree(killed / name, ignore_errors=True)
    for name in ("rewards.png", "results.json", "report.md"):
        (killed / name).unlink()
    before = json.loads((killed / "evaluation.json").read_text(encoding="utf-8"))["before"]
    (killed / "evaluation.json").write_text(json.dumps({"before": before}), encoding="utf-8")
    (place / "odd.py").write_text("def score(texts): return [0.5] * len(texts)\n")
    (place / "prompts.txt").write_text("刚收到货,感觉\n质量\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--first", type=int, default=1, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10**9, help="how many at most")
    parser.add_argument("--seed", type=int, help="try this case alone")
    args = parser.parse_args()
    for name in LOADED:  # once, and not in every process
        importlib.import_module(name)
    torch.set_num_threads(1)
    since, endings, failures = time.monotonic(), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        files.mkdir()
        make_files(files)
        first, last = (args.seed, args.seed) if args.seed is not None else (args.first, args.first + args.cases - 1)
        seed = first
        while seed <= last and time.monotonic() - since < 60 * args.minutes:
            what, ended, wrong = try_case(seed, files, loud=args.seed is not None)
            endings[ended if ended in ("went on", "stopped") else "refused"] += 1
            failures += bool(wrong)
            if wrong or args.seed is not None:
                print(f"--seed {seed}: {what}\n    {ended}\n    {'; '.join(wrong) or 'as it should be'}", flush=True)
            seed += 1
    counts = ", ".join(f"{count} {ended}" for ended, count in sorted(endings.items()))
    minutes = (time.monotonic() - since) / 60
    print(f"{seed - first} cases, {first} to {seed - 1}, in {minutes:.1f} min: {counts}; {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
