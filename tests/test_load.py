"""What a run loads, in which order, and what several processes compare of it."""

import copy
import hashlib
import shutil
import zlib

import pytest
import torch

from config import PPOConfig
from support.common.errors import UserError
from support.compute import processes
from support.models.demo_models import NEGATIVE
from support.run.load import PROGRAM, check_same, hash_of, load, load_folders
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import ROOT, write_classifier

PROMPT = "刚收到货,感觉"  # 7 characters, and [CLS] before


def settings(**changes) -> PPOConfig:
    return PPOConfig(**{"device": "cpu", "dtype": "float32", "gen_len": 4, **changes})


# ----------------------------------------------------------------------------------------------
# One process


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
    ("prompts", "gen_len", "fits"), [(["衣服", PROMPT, "书"], 41, False), (["衣服", PROMPT, "书"], 40, True)]
)
def test_the_longest_prompt_and_its_completion_fill_the_48_positions(
    gpt2_folder, classifier_folder, prompts, gen_len, fits
):
    config = settings(prompts=prompts, gen_len=gen_len)
    if fits:
        policy, tokenizer, *_ = load_folders(config, "cpu", gpt2_folder, classifier_folder)
        trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
        assert 1 <= len(trainer.generate(trainer.encode(prompts))[0]) <= gen_len
    else:
        with pytest.raises(UserError, match=f"--gen_len {gen_len} is too long: .* 48 .* takes 8$"):
            load_folders(config, "cpu", gpt2_folder, classifier_folder)


def test_configs_and_prompts_are_checked_before_any_weights(gpt2_folder, classifier_folder, tmp_path, monkeypatch):
    """Before they are downloaded, and before they are read."""
    folders = {"gpt2": gpt2_folder, "sentiment": classifier_folder, "unclear": write_classifier(tmp_path, ("a", "b"))}
    found = []

    def model_folder(name, flag, check):
        check(folders[name])
        found.append(flag)
        return folders[name]

    monkeypatch.setattr("support.run.load.model_folder", model_folder)
    for names, changes, line, flags in (
        (("sentiment", "sentiment"), {}, "type 'bert'", []),
        (("gpt2", "unclear"), {}, "which label", ["--model_name"]),
        (("gpt2", "unclear"), {"positive_label": "happy"}, "happy", ["--model_name"]),
        (("gpt2", "missing"), {"reward": "builtins:no"}, "no", ["--model_name"]),
        (("gpt2", "sentiment"), {"prompts": ["好" * 60]}, "--gen_len", ["--model_name", "--reward_model_name"]),
    ):
        found.clear()
        with monkeypatch.context() as patch, pytest.raises(UserError, match=line):
            patch.setattr("support.run.load.load_policy", lambda *args: pytest.fail("read too early"))
            load(settings(model_name=names[0], reward_model_name=names[1], **changes))
        assert found == flags
    _, _, reward, _ = load(settings(model_name="gpt2", reward_model_name="unclear", positive_label="b"))
    assert reward.positive_label == "b"


# ----------------------------------------------------------------------------------------------
# Several processes


@pytest.fixture
def compared(monkeypatch):
    """A function that returns what `check_same` compares, and the models that are replaced by rank 0's."""

    def compare(config, *parts):
        values, replaced = {}, []
        monkeypatch.setattr(processes, "check_same", values.update)
        monkeypatch.setattr(processes, "broadcast_weights", replaced.append)
        check_same(config, *parts)
        return values, replaced

    return compare


@pytest.fixture
def parts(gpt2_folder, classifier_folder):
    return load_folders(settings(), "cpu", gpt2_folder, classifier_folder)


GPT2, SENTIMENT = "uer/gpt2-chinese-cluecorpussmall", "uer/roberta-base-finetuned-jd-binary-chinese"
HASHES = [  # these names are in the inputs.json of every run
    "the hash of the prompts",
    f"the hash of the weights of --model_name {GPT2}",
    f"the hash of the tokenizer of --model_name {GPT2}",
    f"the hash of the weights of --reward_model_name {SENTIMENT}",
    f"the hash of the tokenizer of --reward_model_name {SENTIMENT}",
]


def test_processes_compare_versions_program_device_dtype_and_inputs(compared, parts):
    values, replaced = compared(settings(dtype="bfloat16"), *parts)
    assert values["torch"] == torch.__version__ and {"transformers", "numpy"} < values.keys()
    assert values["--device cpu"] == "cpu" and values["--dtype bfloat16"] == "bfloat16"
    assert [name for name in values if "hash" in name] == ["the hash of this program's files", *HASHES]
    assert compared(settings(dtype="bfloat16"), *parts) == (values, replaced) and replaced == []


def test_another_classifier_or_program_changes_its_own_hash(compared, parts, tmp_path, monkeypatch):
    """The other inputs are in test_resume.py."""
    classifier = parts[2].pipeline.model
    values, _ = compared(settings(), *parts)

    def changed() -> list[str]:
        now, _ = compared(settings(), *parts)
        return [name for name in values if now[name] != values[name]]

    classifier.classifier.bias.data[-1] += 1
    assert changed() == [HASHES[3]]
    classifier.classifier.bias.data[-1] -= 1
    classifier.bfloat16()
    assert changed() == []  # a run may go on after the classifier's dtype has changed

    program = tmp_path / "ppo.py"
    shutil.copy(ROOT / "ppo.py", program)
    monkeypatch.setattr("support.run.load.PROGRAM", [program if path.name == "ppo.py" else path for path in PROGRAM])
    assert changed() == []
    program.write_bytes(program.read_bytes() + b"#")
    assert changed() == ["the hash of this program's files"]


@pytest.mark.parametrize(("policy_is_demo", "reward_is_demo"), [(True, False), (False, True)])
def test_only_the_demo_models_are_replaced_by_those_of_rank_0(compared, parts, policy_is_demo, reward_is_demo):
    names = {"model_name": "demo"} if policy_is_demo else {}
    names |= {"reward_model_name": "demo"} if reward_is_demo else {}
    policy, _, reward, _ = parts
    expected = [policy] * policy_is_demo + [reward.pipeline.model] * reward_is_demo
    _, replaced = compared(settings(**names), *parts)
    assert list(map(id, replaced)) == list(map(id, expected))


def test_a_hash_depends_on_names_shapes_dtypes_and_every_number():
    weights = {"a": torch.arange(600.0).reshape(20, 30), "b": torch.zeros(2, dtype=torch.bfloat16)}
    last = weights["a"].clone()
    last[-1, -1] += 1e-3
    others = [
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"].reshape(30, 20), "b": weights["b"]},
        {"a": last, "b": weights["b"]},
        {"a": weights["a"], "b": weights["b"].half()},
        {"a": weights["a"]},
    ]
    assert len({hash_of(weights), *map(hash_of, others)}) == 6
    assert hash_of(weights) == hash_of({"a": weights["a"].T.contiguous().T, "b": weights["b"].clone()})
    # A run's inputs.json has these hashes, so that a later version must compute the same
    line = f"a (2,) torch.int64 {zlib.crc32((3).to_bytes(8, 'little') + (4).to_bytes(8, 'little'))}\n"
    assert hash_of({"a": torch.tensor([3, 4])}) == hashlib.sha256(line.encode()).hexdigest()[:12]
    assert hash_of(["a", 1]) == hashlib.sha256(b"['a', 1]").hexdigest()[:12]
