"""The command line: what it accepts, what it shows, and one line for everything it refuses."""

import json
import re
import subprocess
import sys

import pytest
import torch

import config
from config import PPOConfig, UserError, load_config, parse_args
from tests.conftest import ROOT


def parsed(*argv) -> PPOConfig:
    values, _ = parse_args(list(argv))
    values.check()
    return values


def test_default_values():
    c = parsed()
    assert (c.model_name, c.reward_model_name) == (
        "uer/gpt2-chinese-cluecorpussmall",
        "uer/roberta-base-finetuned-jd-binary-chinese",
    )
    assert (c.prompts, c.episodes, c.batch_size, c.gen_len, c.ppo_epochs) == (["刚收到货,感觉"], 20_000, 128, 16, 4)
    assert (c.lr, c.init_kl_coef, c.target, c.horizon) == (4e-5, 0.2, 6, 10_000)
    assert (c.gamma, c.cliprange, c.cliprange_value, c.vf_coef) == (1, 0.2, 0.2, 0.1)
    assert c.n_steps() == 157


def test_flags_override_the_preset_wherever_they_stand():
    for argv in (["--preset", "demo", "--episodes", "64"], ["--episodes", "64", "--preset", "demo"]):
        c = parsed(*argv)
        assert c.episodes == 64 and c.model_name == "demo"
    c = parsed(
        "--lr",
        "5e-5",
        "--batch_size",
        "64",
        "--minibatch-size",
        "32",
        "--prompts",
        "刚收到货,感觉",
        "这部电影很",
        "--no-detach-value",
    )
    assert (c.lr, c.batch_size, c.minibatch_size, c.prompts[1], c.detach_value) == (5e-5, 64, 32, "这部电影很", False)


def test_the_names_of_given_flags_are_told():
    assert parse_args(["--lr", "1e-5", "--resume", "x"])[1] == {"lr", "resume"}


def test_help_in_a_fresh_process_loads_no_model_library():
    code = (
        "import sys; sys.argv = ['train_ppo.py', '--preset', 'demo', '--help']\n"
        "import train_ppo\n"
        "try: train_ppo.main()\n"
        "except SystemExit as e: assert e.code == 0\n"
        "loaded = {'torch', 'transformers.models'} & set(sys.modules)\n"
        "import transformers\n"
        "assert not loaded or transformers.__version__ < '5.10', loaded"  # early 5.x loads torch with anything
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "--reward_model_name" in text and "(default: demo)" in text and "(default: 10240)" in text
    assert all(result.stdout.count(f"\n  --{name} ") == 1 for name in PPOConfig.__dataclass_fields__)
    titles = [line[:-1] for line in result.stdout.splitlines() if re.fullmatch(r"\w.*:", line)]
    assert titles == ["options", *config.GROUPS.values()]
    kl = result.stdout.split(config.GROUPS["init_kl_coef"])[1].split("\n\n")[0]
    assert "--kl_controller" in kl and "--lr" not in kl and "--cliprange" not in kl
    assert result.stdout.startswith("usage: python train_ppo.py [--NAME VALUE ...]\n\n")
    assert result.stdout.count("\n  python train_ppo.py --") == 2
    assert "--no_detach_value Sets --detach_value to False." in text


def test_empty_prompts_are_refused(tmp_path):
    for argv in (["--prompts", ""], ["--prompts", "好", "  "], ["--model_name", ""], ["--prompts_file", str(tmp_path)]):
        with pytest.raises(UserError):
            parsed(*argv)
    file = tmp_path / "prompts.txt"
    for content, said in (
        (b"", "holds no prompt"),
        ("好\n\n坏\n".encode(), "prompt 2 is empty"),
        ("好".encode("gbk"), "not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=said):
            parsed("--prompts_file", str(file))
    file.write_text("\ufeff刚收到货,感觉\n这部电影很\n\n", encoding="utf-8")
    assert parsed("--prompts_file", str(file)).read_prompts() == ["刚收到货,感觉", "这部电影很"]


def test_a_config_survives_its_file(tmp_path):
    c = parsed("--lr", "3e-5", "--prompts", "这部电影很")
    c.save(tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == c
    assert "这部电影很" in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "no config of this program"),
        ('{"learning": 1}', "'learning'"),
        ('{"lr": "big"}', "lr must be of type float, not 'big'"),
        ('{"batch_size": 1.5}', "batch_size must be of type int"),
        ('{"prompts": "好"}', "prompts must be of type"),
        ('{"dtype": "int8"}', "--dtype int8 is unknown"),
        ('{"detach_value": 1}', "detach_value must be of type bool"),
        ('{"resume": 3}', "resume must be of type"),
        ('{"lr": 1e-4}', "written by another version of this program and lacks 'adam_epsilon'"),
    ],
)
def test_broken_config_files_are_named(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "config.json")


def test_auto_dtype_is_bfloat16_only_where_native(monkeypatch):
    cpu = torch.device("cpu")
    for avx, amx, expected in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        assert config.pick_dtype("auto", cpu) == expected
    assert config.pick_dtype("auto", torch.device("mps")) == torch.float32
    assert config.pick_dtype("float32", cpu) == torch.float32


def test_config_json_holds_every_field(tmp_path):
    parsed().save(tmp_path / "c.json")
    assert set(json.loads((tmp_path / "c.json").read_text())) == set(PPOConfig.__dataclass_fields__)
