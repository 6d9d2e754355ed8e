"""What a run loads and in which order, and what its processes compare."""

import copy
import gc
import hashlib
import shutil
import zlib
from types import SimpleNamespace

import pytest
import torch

import support
from config import PPOConfig
from reward import SentimentReward
from support.common.errors import UserError
from support.compute import processes
from support.models.demo_models import NEGATIVE
from support.run.evaluation import evaluate
from support.run.load import hash_of, input_hashes, load, load_folders
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import VOCAB, as_rewards, read_json, rows, small_run, write_classifier, write_gpt2
from train_ppo import main

PROMPT = "刚收到货,感觉"  # 7 characters, plus [CLS]
SMALL_DEMO = dict(preset="demo", device="cpu", eval_samples=16)


def settings(**changes) -> PPOConfig:
    return PPOConfig(**{"device": "cpu", "dtype": "float32", "gen_len": 4} | changes)


def test_the_garbage_collector_is_off_only_while_libraries_are_imported(monkeypatch):
    collecting = []
    monkeypatch.setattr(support, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr("gc.freeze", lambda: collecting.append(gc.isenabled()))
    support.import_libraries()
    assert collecting == [False] and gc.isenabled()


def test_load_returns_the_models_and_prompts_of_the_settings(gpt2_folder, classifier_folder):
    names = dict(model_name=str(gpt2_folder), reward_model_name=str(classifier_folder))
    config = settings(**names, prompts=[PROMPT, "衣服"], positive_label=NEGATIVE, dtype="bfloat16")
    policy, _, reward, prompts, queries, reference = load(config)
    assert all(map(torch.equal, policy.parameters(), reference.parameters())) and reference is not policy
    assert prompts == [PROMPT, "衣服"]
    classifier = reward.functions["classifier"]
    assert classifier.positive_label == NEGATIVE and classifier.pipeline.model.dtype == torch.bfloat16
    assert policy.dtype == torch.float32
    saved = torch.load(gpt2_folder / "pytorch_model.bin")
    assert torch.equal(policy.transformer.wpe.weight, saved["transformer.wpe.weight"])


def test_the_longest_prompt_and_its_completion_may_fill_all_positions(gpt2_folder, classifier_folder):
    prompts = ["衣服", PROMPT, "书"]
    config, models = settings(prompts=prompts, gen_len=40), {"classifier": classifier_folder}
    policy, tokenizer, *_ = load_folders(config, "cpu", {"prompt": prompts}, gpt2_folder, models)
    trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
    assert 1 <= len(trainer.generate(trainer.encode(prompts))[0]) <= 40
    with pytest.raises(UserError, match="--gen_len 41 is too long: .* 48 .* takes 8 of them$"):
        load_folders(settings(gen_len=41), "cpu", {"prompt": prompts}, gpt2_folder, models)


@pytest.mark.parametrize(
    ("sizes", "vocab", "said"),
    [
        ({"n_layer": 3, "n_head": 4}, VOCAB, "n_layer 3 instead of 2, n_head 4 instead of 2; give"),
        ({}, [*VOCAB[:5], *VOCAB[:4:-1]], "it has a different vocabulary; give"),
    ],
)
def test_an_incompatible_reference_is_rejected_before_weights_are_read(
    gpt2_folder, tmp_path, monkeypatch, sizes, vocab, said
):
    folder = write_gpt2(tmp_path / "other", **sizes)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    monkeypatch.setattr("support.run.load.load_policy", lambda *args: pytest.fail("read too early"))
    monkeypatch.setattr("support.run.text_trainer.load_policy", lambda *args: gpt2_folder)
    config = settings(model_name=str(gpt2_folder), reference=str(folder), reward=["builtins:len"])
    for opens in (load, lambda config: TextPPOTrainer.from_pretrained(gpt2_folder, config)):
        with pytest.raises(UserError, match=f"^--reference {folder} doesn't fit --model_name: .*{said}"):
            opens(config)


def test_a_second_round_of_training_measures_kl_to_the_original(finished, demo, tmp_path, capsys, without_pictures):
    """This also holds after --resume, with --eval_only and in Python. Replacing the original is an error."""
    original = shutil.copytree(demo[0], tmp_path / "original")
    flags = ["--model_name", str(finished / "model"), "--reference", str(original), "--frozen_share", "0.5"]
    assert small_run(tmp_path, *flags)[0] == 0
    run_dir, first = tmp_path / "run", read_json(finished / "evaluation.json")
    assert "value head" not in capsys.readouterr().out  # the reference doesn't need one
    config = PPOConfig(**SMALL_DEMO, reference=str(original))
    trainer = TextPPOTrainer.from_pretrained(finished / "model", config)
    queries = trainer.encode([PROMPT])
    again = evaluate(trainer, trainer.model, as_rewards(lambda texts: [0.0] * len(texts)), [PROMPT], queries)
    assert again.kl == pytest.approx(first["after"]["kl"], rel=1e-4) and again.kl > 1e-3
    assert float(rows(run_dir)[0]["objective/kl"]) > 0.2 * again.kl
    for flags in [], ["--resume", str(run_dir), "--episodes", "64"], ["--eval_only", str(run_dir)]:
        assert not flags or main(flags) == 0
        evaluated = read_json(run_dir / "evaluation.json")
        assert evaluated["before"] == first["before"] and evaluated["after"]["kl"] > 0.2 * again.kl
    shutil.copy(finished / "model" / "model.safetensors", original)
    assert main(["--eval_only", str(run_dir)]) == 2
    assert f"the hash of the weights of --reference {original} is" in capsys.readouterr().err


def test_configs_and_prompts_are_checked_before_weights_are_read(gpt2_folder, classifier_folder, tmp_path, monkeypatch):
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
        (("gpt2", "missing"), {"reward": ["builtins:no"]}, "no", ["--model_name"]),
        (("gpt2", "sentiment"), {"prompts": ["好" * 60]}, "--gen_len", ["--model_name", "--reward_model_name"]),
    ):
        found.clear()
        with monkeypatch.context() as patch, pytest.raises(UserError, match=line):
            patch.setattr("support.run.load.load_policy", lambda *args: pytest.fail("read too early"))
            load(settings(model_name=names[0], reward_model_name=names[1], **changes))
        assert found == flags


@pytest.fixture
def parts(gpt2_folder, classifier_folder):
    return load_folders(settings(), "cpu", {"prompt": ["衣服"]}, gpt2_folder, {"classifier": classifier_folder})


HASHES = ["the hash of the prompts"]  # these names are in the inputs.json of every run
for model in f"--model_name {PPOConfig.model_name}", f"--reward_model_name {PPOConfig.reward_model_name}":
    HASHES += [f"the hash of the weights of {model}", f"the hash of the tokenizer of {model}"]


def test_another_classifier_changes_only_its_own_hash_and_another_dtype_none(parts, classifier_folder, tmp_path):
    before, device = input_hashes(settings(), *parts), torch.device("cpu")
    assert list(before) == HASHES
    parts[2].functions["classifier"] = SentimentReward(classifier_folder, device, torch.bfloat16)
    assert input_hashes(settings(), *parts) == before  # --eval_only accepts another --dtype
    changed = shutil.copytree(classifier_folder, tmp_path / "changed")
    weights = torch.load(changed / "pytorch_model.bin")
    weights["classifier.bias"][-1] += 1
    torch.save(weights, changed / "pytorch_model.bin")
    parts[2].functions["classifier"] = SentimentReward(changed, device)
    after = input_hashes(settings(), *parts)
    assert [name for name in HASHES if after[name] != before[name]] == [HASHES[3]]
    parts[2].columns["answer"] = [1]
    assert input_hashes(settings(), *parts)[HASHES[0]] != before[HASHES[0]]  # other columns of the prompts count, too


def test_processes_compare_versions_device_dtype_and_inputs(monkeypatch, gpt2_folder, classifier_folder):
    values = {}
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "check_same", values.update)
    load(settings(model_name=str(gpt2_folder), reward_model_name=str(classifier_folder), dtype="bfloat16"))
    assert values["--device"] == "cpu" and values["--dtype"] == "torch.bfloat16"
    assert {"torch", "transformers", "numpy", "the hash of the prompts"} < values.keys()


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
    # inputs.json stores these hashes, so later versions must compute the same ones
    line = f"a (2,) torch.int64 {zlib.crc32((3).to_bytes(8, 'little') + (4).to_bytes(8, 'little'))}\n"
    assert hash_of({"a": torch.tensor([3, 4])}) == hashlib.sha256(line.encode()).hexdigest()[:12]
    assert hash_of(["a", 1]) == hashlib.sha256(b"['a', 1]").hexdigest()[:12]
