"""What comes from elsewhere, as names, model folders and prompts: it runs no code, steers no terminal, takes no memory
for nothing, and is told in one line where it will not do."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from config import PPOConfig
from reward import SentimentReward
from support import models
from support.checkpoint import load_checkpoint
from support.errors import UserError
from support.text_trainer import TextPPOTrainer
from tests.helpers import ROOT
from tests.test_checkpoint import make, whole_ones
from train_ppo import main

# --- on the screen

STEERING = ["\x1b[31m", "\x1b]0;title\x07", "\b", "\x7f", "\x9b1m", "\u202e", "\u2066", "\u200f", "\u2028", "\x85"]
HARMLESS = "刚收到货　，“感觉”é ñ 👍🏽 👨‍👩‍👧 \\x1b"


@pytest.mark.parametrize("name", STEERING)
def test_names_steer_no_terminal(name, capsys):
    assert main(["--model_name", f"./感觉{name}/no", "--preset", "demo"]) == 2
    err = capsys.readouterr().err
    assert name not in err and f"./感觉{ascii(name)[1:-1]}/no" in err and err.count("\n") == 1


def test_an_error_is_one_line_of_plain_text():
    """Whatever file or exception it quotes."""
    assert str(UserError("a\nb\r\n\tc\0")) == "a\\nb\\r\\n\\tc\\x00"
    assert str(UserError(HARMLESS)) == HARMLESS


def test_what_is_printed_steers_no_terminal_but_a_progress_bar_stays_one():
    """And nobody closes the streams."""
    code = (
        "import sys\n"
        "from support.streams import hold_streams\n"
        "from tqdm import tqdm\n"
        "hold_streams()\n"
        "for number in tqdm(range(2), desc='bar\\x1b[0m', mininterval=0):\n"
        "    tqdm.write(sys.argv[1] + 'a\\tb\\rc')\n"
        "    sys.stdout.close(), sys.stderr.close()\n"
        "raise KeyError(ValueError(sys.argv[1]))\n"
    )
    printed = "".join(STEERING) + HARMLESS
    result = subprocess.run([sys.executable, "-c", code, printed], cwd=ROOT, capture_output=True)
    out, err = result.stdout.decode(), result.stderr.decode()
    shown = "".join(ascii(name)[1:-1] for name in STEERING) + HARMLESS
    assert out == f"{shown}a\tb\\rc\n" * 2
    assert "\rbar\\x1b[0m: 100%" in err and "\x1b" not in err and "Traceback" in err and result.returncode == 1


# --- model folders


def edit(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load_gpt2(folder):
    config, tokenizer = models.read_policy_folder(folder)
    return models.load_policy(folder, config), tokenizer


def load_classifier(folder):
    return SentimentReward(folder, "cpu")


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


EVIL_CONFIG = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C"}}
EVIL_TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}


@pytest.mark.parametrize(
    ("load", "change", "said"),
    [
        (load_gpt2, lambda f: edit(f, **EVIL_CONFIG), None),
        (load_gpt2, lambda f: edit(f, model_type="evil", **EVIL_CONFIG), "is no readable model config"),
        (load_classifier, lambda f: edit(f, **EVIL_CONFIG), None),
        (load_classifier, lambda f: edit(f, model_type="evil", **EVIL_CONFIG), "is no readable model config"),
        (load_classifier, lambda f: edit(f, model_type="bert-generation", **EVIL_CONFIG), "cannot be loaded"),
        (load_gpt2, lambda f: edit(f, "tokenizer_config.json", **EVIL_TOKENIZER), None),
        (load_gpt2, lambda f: edit(f, "tokenizer_config.json", tokenizer_class="C", **EVIL_TOKENIZER), "the tokenizer"),
        (models.load_tokenizer, lambda f: edit(f, model_type="evil", **EVIL_CONFIG), None),
        (load_gpt2, lambda f: edit(f, attn_implementation="evil/kernel"), None),
        (load_classifier, lambda f: edit(f, _attn_implementation="evil/kernel"), None),
        (load_gpt2, lambda f: torch.save({"a": Evil()}, f / "pytorch_model.bin"), "cannot be loaded"),
        (load_classifier, lambda f: torch.save([Evil()], f / "pytorch_model.bin"), "cannot be loaded"),
    ],
)
def test_a_model_folder_runs_no_code_and_asks_nothing(
    gpt2_folder, classifier_folder, tmp_path, monkeypatch, load, change, said
):
    """Neither that in the folder, nor in its weights, nor an attention kernel of the hub."""
    folder = shutil.copytree(classifier_folder if load is load_classifier else gpt2_folder, tmp_path / "model")
    (folder / "evil.py").write_text("open('ran', 'w')\nclass C: pass\n")
    change(folder)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    if said is None:
        load(folder)
    else:
        with pytest.raises(UserError, match=said):
            load(folder)
    assert asked == [] and os.listdir(tmp_path) == ["model"] and os.listdir(folder).count("__pycache__") == 0


DIFFER = "config.json and the weights beside it do not belong together: it "


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("load", "change", "said"),
    [
        (load_gpt2, {"n_layer": 10**6}, "has 1000000 layers, they are 3. tensors"),
        (load_gpt2, {"n_embd": 10**7}, r"makes transformer.wte.weight \(43, 10000000\), they hold \(43, 32\)"),
        (load_gpt2, {"n_positions": 10**9}, r"makes transformer.wpe.weight \(1000000000, 32\), they hold \(48, 32\)"),
        (load_gpt2, {"n_layer": 20}, "makes a model of 257,089 numbers, they are [0-9,]*"),
        (load_classifier, {"num_hidden_layers": 10**6}, "has 1000000 layers, they are 25 tensors"),
        (load_classifier, {"hidden_size": 10**7}, r"makes bert.embeddings.word_embeddings.weight \(43, 10000000\), .*"),
        (load_classifier, {"vocab_size": 10**11}, r"makes bert.embeddings.word_embeddings.weight .* \(43, 16\)"),
    ],
)
def test_a_config_that_its_weights_belie_is_told_before_the_model_is_built(
    gpt2_folder, classifier_folder, tmp_path, monkeypatch, load, change, said, kind
):
    folder = shutil.copytree({load_gpt2: gpt2_folder, load_classifier: classifier_folder}[load], tmp_path / "model")
    if kind == "safetensors":
        weights = torch.load(folder / "pytorch_model.bin")
        save_file({name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors")
        (folder / "pytorch_model.bin").write_bytes(b"")
    edit(folder, **change)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match=f"{DIFFER}{said}$"):
        load(folder)


def test_a_million_labels_are_not_counted_out(classifier_folder, tmp_path):
    folder = shutil.copytree(classifier_folder, tmp_path / "model")
    edit(folder, num_labels=10**30)
    with pytest.raises(UserError, match="num_labels is over a million"):
        load_classifier(folder)


def test_weights_of_torch_s_first_format_open(gpt2_folder, tmp_path):
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load_gpt2(folder)[0].transformer.wpe.weight, weights["transformer.wpe.weight"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "vocab.txt").write_text("\n".join("[PAD] [CLS] [SEP] [MASK] a".split())),
        lambda f: edit(f, "tokenizer_config.json", model_max_length="long"),
        lambda f: edit(f, "tokenizer_config.json", model_max_length=-1),
        lambda f: edit(f, "tokenizer_config.json", cls_token=["[CLS]"]),
        lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000),
    ],
)
def test_a_tokenizer_that_would_fail_later_is_told_when_it_is_loaded(gpt2_folder, tmp_path, damage):
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=f"^the tokenizer in {folder} cannot be loaded"):
        models.load_tokenizer(folder)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_config.json", "model.safetensors", "added_tokens.json"])
@pytest.mark.parametrize("load", [load_gpt2, load_classifier])
def test_a_model_folder_with_a_file_that_never_ends_is_not_read(gpt2_folder, classifier_folder, tmp_path, load, name):
    folder = shutil.copytree({load_gpt2: gpt2_folder, load_classifier: classifier_folder}[load], tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"^{folder / name} is no file, but a device or a pipe; "):
        load(folder)


# --- checkpoints


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kl_coef": "0.2"}, "kl_coef is missing, or not what it should be; remove this checkpoint"),
        ({"skipped_in_a_row": None}, "skipped_in_a_row is missing, or not what it should be"),
        ({"step": 2.0}, "step is missing, or not what it should be"),
        ({"sha256": [1]}, "sha256 is missing, or not what it should be"),
    ],
)
def test_a_checkpoint_whose_state_is_not_what_it_should_be_is_passed_over(policy, tmp_path, change, said, capsys):
    whole_ones(policy, tmp_path, 1, 2)
    edit(tmp_path / "step-000002", "state.json", **change)
    load_checkpoint(make(policy), tmp_path)
    state = tmp_path / "step-000002" / "state.json"
    assert f"step-000002 cannot be used ({state} is damaged: {said}" in capsys.readouterr().out


def test_a_checkpoint_with_a_pipe_in_it_is_passed_over(policy, tmp_path, capsys):
    whole_ones(policy, tmp_path, 1, 2)
    weights = tmp_path / "step-000002" / "policy.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    load_checkpoint(make(policy), tmp_path)
    assert f"step-000002 cannot be used ({weights} is no file, but a device or a pipe" in capsys.readouterr().out


# --- prompts


@pytest.fixture(scope="module")
def lower(gpt2_folder, tmp_path_factory):
    """A trainer whose tokenizer keeps capitals, which its vocabulary does not know, as that of published models."""
    folder = shutil.copytree(gpt2_folder, tmp_path_factory.mktemp("lower") / "model")
    edit(folder, "tokenizer_config.json", do_lower_case=False)
    return TextPPOTrainer.from_pretrained(folder, PPOConfig(device="cpu"))


WRITTEN = " written out, which is no text here; leave it out"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("衣服Good", "the vocabulary does not know 'Good' in the prompt '衣服Good'; write '衣服good'"),
        (
            "衣服goodx",
            "the vocabulary does not know 'goodx' in the prompt '衣服goodx'; leave it out, or say it otherwise",
        ),
        ("衣服 oo", "the vocabulary does not know 'oo' in the prompt '衣服 oo'; leave it out, or say it otherwise"),
        ("good很👍", "the vocabulary does not know '👍' in the prompt 'good很👍'; leave it out, or say it otherwise"),
        ("衣服[SEP]", "the prompt '衣服[SEP]' has [SEP]" + WRITTEN),
        ("[CLS]衣服", "the prompt '[CLS]衣服' has [CLS]" + WRITTEN),
        ("衣服[UNK]", "the prompt '衣服[UNK]' has [UNK]" + WRITTEN),
        ("[MASK]", "the prompt '[MASK]' has [MASK]" + WRITTEN),
    ],
)
def test_a_prompt_that_the_model_would_see_as_another_is_refused(lower, prompt, said):
    """From Python, too."""
    with pytest.raises(ValueError) as error:
        lower.encode(["衣服", prompt])
    assert str(error.value) == said


def test_a_tokenizer_that_lower_cases_takes_capitals(gpt2_folder):
    assert models.encode_prompt(models.load_tokenizer(gpt2_folder), "衣服GOOD").tolist() == [2, 30, 31, 41]


def test_a_run_tells_an_unknown_character_before_any_weights(gpt2_folder, tmp_path, capsys):
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"")
    given = ["--preset", "demo", "--model_name", str(folder), "--runs_dir", str(tmp_path / "runs"), "--device", "cpu"]
    assert main([*given, "--prompts", "刚收到货", "这台5G手机"]) == 2
    assert "the vocabulary does not know '台' in the prompt '这台5G手机'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- places


LONG = "a" * 300
DEMO = ["--preset", "demo", "--device", "cpu"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*DEMO, "--run_name", LONG], f"--run_name {LONG!r} is no plain name"),
        ([*DEMO, "--runs_dir", LONG, "--run_name", "run"], f"{LONG}/run cannot be used: File name too long"),
        ([*DEMO, "--prompts_file", LONG], f"--prompts_file {LONG} cannot be read: File name too long"),
        ([*DEMO, "--model_name", LONG], f"{LONG} is no hub id"),
        ([*DEMO, "--reward_model_name", f"{LONG}/"], f"{LONG}/: there is no such folder, and it is no hub id"),
        (["--resume", LONG], f"{LONG}/config.json cannot be used: File name too long"),
        (["--eval_only", LONG], f"{LONG}/config.json cannot be used: File name too long"),
        ([*DEMO, "--model_name", "~no-such-user/gpt2"], "~no-such-user/gpt2: there is no such folder, and it is no"),
        ([*DEMO, "--model_name", "nobody/gtp2"], "; and no folder here has that name"),
        ([*DEMO, "--prompts", "a\udcff"], "--prompts a\\udcff is no text in UTF-8"),
        ([*DEMO, "--runs_dir", "a\udcff"], "--runs_dir a\\udcff is no text in UTF-8"),
        (["--resume", "a\udcff"], "a\\udcff is no run folder"),
        (["--\udcff", "a"], "unknown argument --\\udcff"),
        (["--gen_len", "9" * 5000], "argument --gen_len: invalid int value"),
        (["--gen_len", "9" * 400], "--gen_len must be at least 1 and at most 9223372036854775807, not 9999999"),
        (["--lr", "1" + "0" * 400], "--lr must be above 0 and finite, not inf"),
    ],
)
def test_a_name_that_no_system_takes_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("train_ppo.py: error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("method", ["iterdir", "is_file"])
def test_a_folder_that_one_may_not_look_into_is_named(gpt2_folder, tmp_path, monkeypatch, capsys, method):
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    was = getattr(Path, method)

    def refuse(path):
        if path.is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return was(path)

    monkeypatch.setattr(Path, method, refuse)
    assert main([*DEMO, "--model_name", str(folder), "--runs_dir", str(tmp_path / "runs")]) == 2
    assert f"error: {folder}" in (err := capsys.readouterr().err) and err.endswith(
        "cannot be used: Permission denied\n"
    )
    with pytest.raises(ValueError, match="cannot be used: Permission denied"):
        TextPPOTrainer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["", " ", "file"])
def test_a_model_is_saved_into_a_folder_that_is_named(lower, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=f"^save\\(\\) takes the name of a folder, not '{name}'$"):
        lower.save(name)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == "kept"


def test_a_model_that_cannot_be_saved_is_a_value_error(lower, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "model", tmp_path / LONG):
        with pytest.raises(ValueError, match="cannot be written: (Not a directory|File name too long)"):
            lower.save(folder)
