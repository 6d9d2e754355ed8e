"""Every kind of bad input, and the one line that the user sees.

    python -m tools.bad_inputs > docs/errors.md        writes the table anew

`tests/test_bad_inputs.py` runs every case: exit code 2, one line, no traceback, no file harmed.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": "cache"}

import torch

import plot_rewards
import train_ppo

FLAGS = [  # (flags, part of the line)
    ("--batch_size 0", "--batch_size must be at least 1, not 0"),
    ("--episodes -5", "--episodes must be at least 1"),
    ("--eval_samples 0", "--eval_samples must be at least 2, not 0"),
    ("--lr nan", "--lr must be above 0 and finite, not nan"),
    ("--lr inf", "--lr must be above 0 and finite, not inf"),
    ("--lr 0", "--lr must be above 0"),
    ("--lr fast", "invalid float value: 'fast'"),
    ("--gen_len 1.5", "invalid int value: '1.5'"),
    ("--gamma 1.1", "--gamma must be at least 0 and at most 1, not 1.1"),
    ("--lam -0.1", "--lam must be at least 0 and at most 1"),
    ("--temperature 0", "--temperature must be above 0"),
    ("--cliprange -0.2", "--cliprange must be above 0"),
    ("--init_kl_coef -1", "--init_kl_coef must be at least 0"),
    ("--kl_budget -1", "--kl_budget must be at least 0"),
    ("--kl_budget 0.4 --init_kl_coef 0.1", "--kl_budget finds the value of --init_kl_coef: give one of them"),
    ("--target nan", "--target must be above 0"),
    ("--seed -1", "--seed must be at least 0"),
    ("--seed 99999999999999999999", "--seed must be at least 0 and at most"),
    ("--minibatch_size 256", "--minibatch_size 256 is larger than --batch_size 128"),
    ("--average_power -1", "--average_power must be at least 0 and finite"),
    ("--kl_controller adaptiv", "invalid choice: 'adaptiv'"),
    ("--dtype float16", "invalid choice: 'float16'"),
    ("--preset big", "--preset big is unknown; choose one of default, thorough, article, demo"),
    ("--device tpu", "--device tpu is unknown; choose auto, cpu, cuda, cuda:N or mps"),
    ("--device cuda:99", "CUDA GPUs here"),
    ("--run_name a/b", "no plain name"),
    ("--run_name ..", "no plain name"),
    ("--preset demo --prompts_file /dev/zero", "is no file, but a device or a pipe"),
    ("--learning_rate 1e-5", "unknown argument --learning_rate; "),
    ("--batchsize 5", "unknown argument --batchsize; did you mean --batch_size?"),
    ("--batch 5", "unknown argument --batch; did you mean --batch_size?"),
    ("stray", "unknown argument stray"),
    ("--prompts", "expected at least one argument"),
    ("--prompts_file missing.txt", "--prompts_file missing.txt cannot be read: No such file"),
    ("--reward nothing", "must be module:function"),
    ("--reward no_such_module:f", "cannot be imported (ModuleNotFoundError"),
    ("--reward math:no_such", "cannot be imported (AttributeError"),
    ("--reward math:pi", "is no function but a float"),
    ("--model_name nobody/not-in-the-cache --preset demo", "HF_HUB_OFFLINE is set, and the cache"),
    ("--model_name ./no/such/folder", "there is no such folder, and it is no hub id"),
    ("--resume runs/nothing", "is no run folder"),
    ("--resume latest --runs_dir nowhere", "no run to resume"),
    ("--eval_only runs/nothing", "is no run folder"),
    ("--complete runs/nothing", "is no run folder"),
    ("--complete run --n 0", "--n must be at least 1"),
    ("--n 3", "--n is how many completions of each prompt --complete shows"),
]


def write(path: str, content: str | bytes):
    """A change to the run folder `run` or the model folders `gpt2` and `sentiment`."""
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(path: str):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:-200])


def in_all_checkpoints(change):
    return lambda: [change(folder) for folder in Path("run/checkpoints").iterdir()]


def without_key(path: str, part: str):
    def change():
        weights = torch.load(path, weights_only=True)
        torch.save({name: tensor for name, tensor in weights.items() if part not in name}, path)

    return change


def with_nan(path: str, name: str):
    def change():
        weights = torch.load(path, weights_only=True)
        torch.save(weights | {name: weights[name] * torch.nan}, path)

    return change


def edit(path: str, **values):
    return lambda: Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | values))


def edit_evaluation_prompts() -> None:
    before = json.loads(Path("run/evaluation.json").read_text())["before"]
    edit("run/evaluation.json", before=before | {"samples": [["好", text, 0.5] for _, text, _ in before["samples"]]})()


NEW = (
    "--preset demo --model_name gpt2 --reward_model_name sentiment "
    "--episodes 16 --batch_size 16 --minibatch_size 16 --eval_samples 4 --run_name new"
)
BROKEN = [  # (what was done, how, command, part of the line)
    ("four completions before training", lambda: None, f"{NEW} --kl_budget 0.4", "of 4 completions before training"),
    ("an empty prompts file", write("p.txt", ""), f"{NEW} --prompts_file p.txt", "holds no prompt"),
    (
        "an empty line in the prompts file",
        write("p.txt", "好\n\n坏\n"),
        f"{NEW} --prompts_file p.txt",
        "prompt 2 is empty",
    ),
    ("a prompts file in GBK", write("p.txt", "感觉".encode("gbk")), f"{NEW} --prompts_file p.txt", "is no UTF-8 text"),
    (
        "a prompt longer than the model",
        write("p.txt", "好" * 60),
        f"{NEW} --prompts_file p.txt",
        "64 positions, which leaves",
    ),
    ("the run's name is taken", lambda: None, NEW.replace("new", "run") + " --runs_dir .", "exists already"),
    ("runs_dir is a file", write("file", ""), f"{NEW} --runs_dir file", "Not a directory"),
    ("model without config.json", lambda: os.remove("gpt2/config.json"), NEW, "it has no config.json"),
    ("model config cut off", write("gpt2/config.json", "{"), NEW, "is no readable model config"),
    (
        "model of another architecture",
        lambda: shutil.copy("sentiment/config.json", "gpt2/config.json"),
        NEW,
        "one of type 'bert'",
    ),
    ("model without weights", lambda: os.remove("gpt2/pytorch_model.bin"), NEW, "no weights in gpt2"),
    (
        "model config that asks for code of its own",
        edit("gpt2/config.json", model_type="x", auto_map={"AutoConfig": "x.X"}),
        NEW,
        "is no readable model config",
    ),
    ("model config of a million layers", edit("gpt2/config.json", n_layer=10**6), NEW, "do not belong together"),
    ("model weights cut off", cut("gpt2/pytorch_model.bin"), NEW, "cannot be loaded"),
    (
        "model weights of half a model",
        without_key("gpt2/pytorch_model.bin", "h.1."),
        NEW,
        "not a whole GPT-2 checkpoint",
    ),
    (
        "model weights with NaN",
        with_nan("gpt2/pytorch_model.bin", "transformer.ln_f.weight"),
        NEW,
        "hold NaN or infinity",
    ),
    ("prompt with a character that the vocabulary lacks", lambda: None, f"{NEW} --prompts 5G", "does not know '5G'"),
    ("prompt with a special token", lambda: None, f"{NEW} --prompts 好[SEP]", "[SEP] written out"),
    ("model with cross-attention", edit("gpt2/config.json", add_cross_attention=True), NEW, "has cross-attention"),
    ("model without vocabulary", lambda: os.remove("gpt2/vocab.txt"), NEW, "no tokenizer in gpt2"),
    (
        "vocabulary of another size",
        write("gpt2/vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n好\n"),
        NEW,
        "do not belong together",
    ),
    ("vocabulary that is no text", write("gpt2/vocab.txt", b"\xff\xfe\x00\xff"), NEW, "the tokenizer in gpt2"),
    (
        "classifier without its head",
        without_key("sentiment/pytorch_model.bin", "classifier"),
        NEW,
        "no classifier with a trained head",
    ),
    ("classifier with unclear labels", lambda: relabel("LABEL_0", "LABEL_1"), NEW, "set --positive_label"),
    (
        "classifier with one label",
        edit("sentiment/config.json", id2label={"0": "stars"}, label2id={"stars": 0}, problem_type="regression"),
        NEW,
        "a regression, and no classifier",
    ),
    ("a label that is not there", lambda: None, f"{NEW} --positive_label happy", "none of the classifier's labels"),
    (
        "reward function raises",
        write("r1.py", "def f(texts): return [1 / 0]\n"),
        f"{NEW} --reward r1:f",
        "ZeroDivisionError",
    ),
    (
        "reward function returns NaN",
        write("r2.py", "def f(texts): return [float('nan')] * len(texts)\n"),
        f"{NEW} --reward r2:f",
        "nan, no finite number",
    ),
    (
        "reward function returns too few",
        write("r3.py", "def f(texts): return [0.5]\n"),
        f"{NEW} --reward r3:f",
        "1 numbers for 4 texts",
    ),
    (
        "reward function returns words",
        write("r4.py", "def f(texts): return ['good'] * len(texts)\n"),
        f"{NEW} --reward r4:f",
        "'good', no finite number",
    ),
    (
        "reward function returns nothing",
        write("r5.py", "def f(texts): pass\n"),
        f"{NEW} --reward r5:f",
        "returned a NoneType",
    ),
    (
        "reward module with a syntax error",
        write("r6.py", "def f(texts) return 1\n"),
        f"{NEW} --reward r6:f",
        "cannot be imported (SyntaxError",
    ),
    (
        "reward function that runs out of memory",
        write("r7.py", "import torch\ndef f(texts): return torch.empty(1 << 60)\n"),
        f"{NEW} --reward r7:f",
        "evaluation: out of memory in the reward function",
    ),
    (
        "reward function ends the program",
        write("r13.py", "import sys\ndef f(texts): sys.exit()\n"),
        f"{NEW} --reward r13:f",
        "raised SystemExit",
    ),
    (
        "reward module ends the program",
        write("r8.py", "raise SystemExit(0)\n"),
        f"{NEW} --reward r8:f",
        "cannot be imported (SystemExit",
    ),
    (
        "reward function is a generator that breaks",
        write("r9.py", "def f(texts):\n    yield 0.5\n    raise KeyError('no such word')\n"),
        f"{NEW} --reward r9:f",
        "raised KeyError: 'no such word'",
    ),
    (
        "reward function returns what float32 cannot hold",
        write("r10.py", "def f(texts): return [1e300] * len(texts)\n"),
        f"{NEW} --reward r10:f",
        "1e+300, no finite number",
    ),
    ("reward is a class", write("r11.py", "class F: pass\n"), f"{NEW} --reward r11:F", "is no function but a class"),
    (
        "reward is a coroutine function",
        write("r12.py", "async def f(texts): pass\n"),
        f"{NEW} --reward r12:f",
        "is no function but a coroutine function",
    ),
    ("the model of a run for the run", lambda: None, "--complete run/model", "give the run, run"),
    ("run config is no JSON", write("run/config.json", "{"), "--resume run", "it is no JSON"),
    ("run config nested too deep", write("run/config.json", "[" * 10**5), "--resume run", "it is no JSON"),
    (
        "run config with a setting twice",
        write("run/config.json", '{"lr": 1, "lr": 2}'),
        "--eval_only run",
        "'lr' stands there twice",
    ),
    (
        "run config of a stranger, with a reward that runs a shell",
        edit("run/config.json", reward="subprocess:getoutput"),
        "--eval_only run",
        "python train_ppo.py --eval_only run --reward subprocess:getoutput",
    ),
    (
        "value head cut off",
        cut("run/model/value_head.safetensors"),
        "--eval_only run",
        "is no value head of this model",
    ),
    (
        "run config of another program",
        write("run/config.json", '{"learning": 1}'),
        "--resume run",
        "it holds 'learning'",
    ),
    (
        "run config with a word for a number",
        write("run/config.json", '{"lr": "big"}'),
        "--resume run",
        "lr must be of type float",
    ),
    (
        "run config of an earlier version",
        write("run/config.json", '{"lr": 1e-4}'),
        "--resume run",
        "written by another version",
    ),
    ("resume with another learning rate", lambda: None, "--resume run --lr 1", "--lr 1.0 would change the result"),
    ("resume with fewer episodes", lambda: None, "--resume run --episodes 16", "they can only be raised"),
    (
        "all checkpoints cut off",
        in_all_checkpoints(lambda c: cut(c / "policy.safetensors")()),
        "--resume run --episodes 64",
        "no usable checkpoint",
    ),
    (
        "all checkpoints without state",
        in_all_checkpoints(lambda c: os.remove(c / "state.json")),
        "--resume run --episodes 64",
        "no usable checkpoint",
    ),
    ("metrics file missing", lambda: os.remove("run/metrics.csv"), "plot run", "cannot be read: No such file"),
    ("metrics file empty", write("run/metrics.csv", ""), "plot run", "has no step yet"),
    ("metrics file of something else", write("run/metrics.csv", "a,b\n1,2\n"), "plot run", "it names no column step"),
    (
        "metrics file with a word for a number",
        write("run/metrics.csv", "step,episodes,env/reward_mean,env/reward_std,objective/kl\n1,16,high,0,0\n"),
        "plot run",
        "damaged in line 2: could not convert string to float: 'high'",
    ),
    (
        "metrics file that a spreadsheet saved with semicolons",
        lambda: write("run/metrics.csv", Path("run/metrics.csv").read_bytes().replace(b",", b";"))(),
        "--resume run --episodes 64",
        "damaged in line 1: it names no column step",
    ),
    (
        "a line of the samples that is no JSON",
        write("run/samples.jsonl", '{"step": 1}\nnice!\n'),
        "--resume run --episodes 64",
        "line 2 of run/samples.jsonl is damaged: it is no JSON",
    ),
    (
        "a start that is no JSON",
        write("run/environment.jsonl", '{"step": 1}\nnice!\n'),
        "--resume run --episodes 64",
        "line 2 of run/environment.jsonl is damaged: it is no JSON",
    ),
    ("evaluation cut off", cut("run/evaluation.json"), "--resume run --episodes 64", "is damaged: it is no JSON"),
    (
        "evaluation without the model before training",
        edit("run/evaluation.json", before=None),
        "--resume run --episodes 64",
        "before is missing, or not what it should be; remove it: --resume makes it again",
    ),
    (
        "evaluation of another run",
        edit_evaluation_prompts,
        "--resume run --episodes 64",
        "is of another prompt, '好'; is it another run's?",
    ),
    (
        "comparison by an unknown setting",
        lambda: None,
        "plot run --by rate",
        "--by rate: no run here has such a setting",
    ),
    ("picture into a missing folder", lambda: None, "plot run --out nowhere/x.png", "cannot be written"),
]


def relabel(*labels: str) -> None:
    path = Path("sentiment/config.json")
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            config | {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        )
    )


def try_out(command: str, change=lambda: None) -> tuple[int, str, bool]:
    """Exit code, stderr, and whether every file in the working folder but the run's settings was left as it was."""
    change()
    before = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    words, err = command.split(), io.StringIO()
    program = plot_rewards.main if words[0] == "plot" else train_ppo.main
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = program(words[words[0] == "plot" :])
    unharmed = all(
        path.exists() and path.read_bytes() == content
        for path, content in before.items()
        if path.name not in (".lock", "config.json", "changes.json", "environment.jsonl")
    )
    return code, err.getvalue(), unharmed


@contextlib.contextmanager
def workplace(gpt2: Path, sentiment: Path, run: Path):
    """A throw-away working folder with copies of two models and a finished run."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for source, name in ((gpt2, "gpt2"), (sentiment, "sentiment"), (run, "run")):
            shutil.copytree(source, Path(folder) / name)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(home)


def print_table() -> None:
    from support.demo_models import demo_models

    gpt2, sentiment = demo_models()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train_ppo.main(
                [
                    *NEW.replace("--model_name gpt2 --reward_model_name sentiment", "").split(),
                    "--episodes",
                    "32",
                    "--runs_dir",
                    folder,
                ]
            )
        print(
            "# Bad input, and the line the user sees\n\n"
            "What each kind of bad input makes the program say; the exit code is always 2. The commonest are\n"
            "explained in Chinese: [errors.zh.md](errors.zh.md).\n\n"
            "Made by `python -m tools.bad_inputs > docs/errors.md`.\n"
        )
        print("| what was tried | what is said |\n| --- | --- |")
        for what, change, command, _ in [(f"`{flags}`", lambda: None, flags, "") for flags, _ in FLAGS] + BROKEN:
            with workplace(gpt2, sentiment, Path(folder) / "new"):
                _, err, _ = try_out(command, change)
                err = err.replace(f"{os.getcwd()}/", "")
            print(f"| {what} | {err.strip().splitlines()[-1].split('error: ', 1)[1].replace('|', chr(92) + '|')} |")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    sys.stdout.reconfigure(encoding="utf-8")
    print_table()
