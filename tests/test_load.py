"""What a run loads, in which order, and what several processes compare of it."""

import copy
import dataclasses
import hashlib
import shutil
import sys

import pytest
import torch

from config import PPOConfig
from support import collectives
from support.demo_models import NEGATIVE
from support.errors import UserError
from support.load import PROGRAM, check_same, hash_of, load, load_folders
from support.text_trainer import TextPPOTrainer
from support.user_code import import_function
from tests.helpers import ROOT, write_classifier, write_gpt2

PROMPT = "刚收到货,感觉"  # 7 characters, and [CLS] before


def settings(**changes) -> PPOConfig:
    return PPOConfig(**{"device": "cpu", "dtype": "float32", "gen_len": 4, **changes})


# --- one process


def test_a_run_loads_the_parts_that_its_settings_name(gpt2_folder, classifier_folder):
    names = dict(model_name=str(gpt2_folder), reward_model_name=str(classifier_folder))
    config = settings(**names, prompts=[PROMPT, "衣服"], positive_label=NEGATIVE, dtype="bfloat16")
    policy, _, reward, prompts = load(config)
    assert prompts == [PROMPT, "衣服"]
    assert reward.positive_label == NEGATIVE and reward.pipeline.model.dtype == torch.bfloat16
    assert policy.dtype == torch.float32
    saved = torch.load(gpt2_folder / "pytorch_model.bin")
    assert torch.equal(policy.transformer.wpe.weight, saved["transformer.wpe.weight"])


@pytest.mark.parametrize(
    ("prompts", "gen_len", "leaves"),
    [
        ([PROMPT], 40, None),
        ([PROMPT], 41, "8 tokens and the model 48 positions, which leaves 40"),
        (["衣服", PROMPT, "书"], 41, "8 tokens and the model 48 positions, which leaves 40"),
        (["好" * 46], 1, None),
        (["好" * 47], 1, "48 tokens and the model 48 positions, which leaves 0"),
        (["好" * 60], 1, "61 tokens and the model 48 positions, which leaves 0"),
    ],
)
def test_the_longest_prompt_and_its_completion_fit_the_model_to_the_last_position(
    gpt2_folder, classifier_folder, prompts, gen_len, leaves
):
    config = settings(prompts=prompts, gen_len=gen_len)
    if leaves is None:
        policy, tokenizer, *_ = load_folders(config, "cpu", gpt2_folder, classifier_folder)
        trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
        (response,) = trainer.generate(trainer.encode(prompts))
        assert 1 <= len(response) <= gen_len
    else:
        with pytest.raises(UserError, match=f"^--gen_len {gen_len}: the longest prompt has {leaves}$"):
            load_folders(config, "cpu", gpt2_folder, classifier_folder)


def test_what_is_quick_to_look_at_comes_first(tmp_path):
    """Both configs, the prompts and their lengths, the reward, and the policy's weights last: mended one by one."""
    gpt2, sentiment = write_gpt2(tmp_path / "gpt2"), write_classifier(tmp_path / "s", ("a", "b"))
    names = dict(model_name=str(gpt2), reward_model_name=str(sentiment))
    for folder in (gpt2, sentiment):
        (folder / "pytorch_model.bin").unlink()
    config = settings(**names, prompts=["好" * 60])
    with pytest.raises(UserError, match="--gen_len 4: the longest prompt"):
        load(config)
    config = dataclasses.replace(config, prompts=["好"])
    with pytest.raises(UserError, match="which label"):
        load(config)
    config = dataclasses.replace(config, positive_label="b")
    with pytest.raises(UserError, match=f"no weights in {sentiment}"):
        load(config)
    with pytest.raises(UserError, match=f"no weights in {gpt2}"):
        load(dataclasses.replace(config, reward="math:fsum"))


def test_each_flag_asks_for_its_model_and_looks_at_its_small_files(
    gpt2_folder, classifier_folder, tmp_path, monkeypatch
):
    asked = []
    unclear = write_classifier(tmp_path / "unclear", ("a", "b"))

    def model_folder(name, flag, check):
        folder = {"gpt2": gpt2_folder, "sentiment": classifier_folder, "unclear": unclear}[name]
        asked.append((name, flag, check(folder) is not None))
        return folder

    monkeypatch.setattr("support.load.model_folder", model_folder)
    load(settings(model_name="gpt2", reward_model_name="sentiment"))
    assert asked == [("gpt2", "--model_name", True), ("sentiment", "--reward_model_name", True)]
    asked.clear()
    with pytest.raises(UserError, match="--positive_label 'happy' is none of"):
        load(settings(model_name="gpt2", reward_model_name="sentiment", positive_label="happy"))
    assert asked == [("gpt2", "--model_name", True)]
    _, _, reward, *_ = load(settings(model_name="gpt2", reward_model_name="unclear", positive_label="b"))
    assert reward.positive_label == "b"
    asked.clear()
    _, _, reward, *_ = load(settings(model_name="gpt2", reward_model_name="missing", reward="builtins:len"))
    assert reward is len and asked == [("gpt2", "--model_name", True)]


# --- several


@pytest.fixture
def compared(monkeypatch):
    """All that `check_same` would compare of a run's parts, by name; and the models that took rank 0's weights."""
    given = []
    monkeypatch.setattr(collectives, "broadcast_weights", given.append)

    def compare(config, *parts):
        found = {}
        monkeypatch.setattr(collectives, "check_same", found.update)
        given.clear()
        check_same(config, *parts)
        return found, list(given)

    return compare


@pytest.fixture
def parts(gpt2_folder, classifier_folder):
    return load_folders(settings(), "cpu", gpt2_folder, classifier_folder)


def differing(first: dict, second: dict) -> list[str]:
    assert list(first) == list(second)
    return [name for name in first if first[name] != second[name]]


GPT2, SENTIMENT = "uer/gpt2-chinese-cluecorpussmall", "uer/roberta-base-finetuned-jd-binary-chinese"


def test_processes_compare_versions_program_device_models_and_prompts(compared, parts):
    found, given = compared(settings(), *parts)
    assert given == []
    assert [name for name in found if "hash" not in name] == [
        "torch", "transformers", "numpy", "--device cpu", "--dtype float32",
    ]  # fmt: skip
    assert [name for name in found if "hash" in name] == [
        "the hash of this program's files",
        f"the hash of the weights of --model_name {GPT2}",
        f"the hash of the tokenizer of --model_name {GPT2}",
        f"the hash of the weights of --reward_model_name {SENTIMENT}",
        f"the hash of the tokenizer of --reward_model_name {SENTIMENT}",
        "the hash of the prompts",
    ]
    assert found["torch"] == torch.__version__ and found["--device cpu"] == "cpu"
    assert found["--dtype float32"] == "float32"
    again, _ = compared(settings(), *parts)
    assert again == found


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_processes_compare_the_device_and_the_dtype_that_each_found(compared, parts, monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    found, _ = compared(settings(device="auto", dtype="auto"), *parts)
    assert found["--device auto"] == "cpu" and found["--dtype auto"] == dtype


def test_each_part_that_differs_is_told_by_its_name(compared, parts, tmp_path, monkeypatch):
    policy, tokenizer, reward, prompts = parts
    found, _ = compared(settings(), *parts)

    now, _ = compared(settings(), policy, tokenizer, reward, ["衣服"])
    assert differing(found, now) == ["the hash of the prompts"]
    with monkeypatch.context() as other:
        other.setattr(type(tokenizer), "encode", lambda self, text, **options: [5] * len(text))
        now, _ = compared(settings(), *parts)
    assert differing(found, now) == ["the hash of the prompts"]  # a tokenizer of other settings

    bias = reward.pipeline.model.classifier.bias.data
    bias += 1
    now, _ = compared(settings(), *parts)
    bias -= 1
    assert differing(found, now) == [f"the hash of the weights of --reward_model_name {SENTIMENT}"]

    policy.v_head.summary.bias.data += 1
    now, _ = compared(settings(), *parts)
    policy.v_head.summary.bias.data -= 1
    assert differing(found, now) == [f"the hash of the weights of --model_name {GPT2}"]

    renamed = {"新" if token == "错" else token: number for token, number in tokenizer.get_vocab().items()}
    now, _ = compared(settings(), policy, type(tokenizer)(vocab=renamed), reward, prompts)
    assert differing(found, now) == [f"the hash of the tokenizer of --model_name {GPT2}"]

    program = tmp_path / "ppo.py"
    shutil.copy(ROOT / "ppo.py", program)
    monkeypatch.setattr("support.load.PROGRAM", [program if path.name == "ppo.py" else path for path in PROGRAM])
    now, _ = compared(settings(), *parts)
    assert now == found
    program.write_bytes(program.read_bytes() + b"#")
    now, _ = compared(settings(), *parts)
    assert differing(found, now) == ["the hash of this program's files"]


def test_a_reward_s_file_is_compared_in_place_of_a_classifier(compared, parts, tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = settings(reward="judge:score")
    import_function(config.reward)
    found, _ = compared(config, *parts)
    assert not any("--reward_model_name" in name for name in found)
    (tmp_path / "judge.py").write_text("def score(texts):\n    return [0.6] * len(texts)\n")
    now, _ = compared(config, *parts)
    assert differing(found, now) == ["the hash of the file of --reward judge:score"]
    del sys.modules["judge"]
    found, _ = compared(settings(reward="builtins:len"), *parts)  # a module without a file
    assert not any("--reward" in name for name in found)


def test_only_the_demo_s_models_are_given_to_all(compared, parts):
    policy, _, reward, *_ = parts
    for names, expected in (
        ({"model_name": "demo"}, [policy]),
        ({"reward_model_name": "demo"}, [reward.pipeline.model]),
        ({"model_name": "demo", "reward_model_name": "demo"}, [policy, reward.pipeline.model]),
    ):
        _, given = compared(settings(**names), *parts)
        assert list(map(id, given)) == list(map(id, expected))


def test_the_program_is_every_file_that_a_run_needs():
    names = {str(path.relative_to(ROOT)).replace("\\", "/") for path in PROGRAM}
    assert {path.name for path in (ROOT / "support").glob("*.py")} == {
        name.removeprefix("support/") for name in names if "/" in name
    }
    here = {path.name for path in ROOT.glob("*.py")} - {"plot_rewards.py"}
    assert {name for name in names if "/" not in name} == here


def test_a_hash_sees_names_shapes_and_every_number():
    weights = {"a": torch.arange(600.0).reshape(20, 30), "b": torch.zeros(2, dtype=torch.bfloat16)}
    expected = hash_of(weights)
    assert expected == hash_of({name: weight.clone() for name, weight in weights.items()})
    other_strides = weights["a"].T.contiguous().T
    assert expected == hash_of(weights | {"a": other_strides}) and len(expected) == 12
    last_is_another = weights["a"].clone()
    last_is_another[-1, -1] += 1e-3
    others = [
        {"a": weights["a"], "c": weights["b"]},
        weights | {"a": weights["a"].reshape(30, 20)},
        weights | {"a": last_is_another},
        weights | {"b": torch.tensor([0, 1e-30], dtype=torch.bfloat16)},
        {"a": weights["a"]},
    ]
    assert len({expected, *map(hash_of, others)}) == 6
    assert hash_of(["a", 1]) == hashlib.sha256(b"['a', 1]").hexdigest()[:12] != hash_of(["a", 2])
