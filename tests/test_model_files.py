"""Opening models and tokenizers in published layouts, rejecting broken ones, and saving for plain transformers."""

import contextlib
import copy
import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, GPT2LMHeadModel, pipeline
from transformers.utils.logging import get_verbosity

from config import PPOConfig
from reward import SentimentReward
from support.common.errors import UserError
from support.models import pretrained as models
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import tiny_run, write_bpe_gpt2, write_gpt2

BIN, SAFE = "pytorch_model.bin", "model.safetensors"
IDS = torch.tensor([[2, 5, 6, 7, 8, 9]])


def load_gpt2(folder):
    config, tokenizer = models.read_policy_folder(folder)
    return models.load_policy(folder, config), tokenizer


def edit(folder, file="config.json", **values):
    settings = json.loads((folder / file).read_text()) | values
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / file).write_text(json.dumps(settings))


def without_last_block(folder):
    weights = torch.load(folder / BIN)
    torch.save({name: weight for name, weight in weights.items() if "h.1." not in name}, folder / BIN)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def same_logits(one, other) -> bool:
    """Check that logits agree up to float32 rounding: sums of about 100 products, relative to the largest logit."""
    return (logits(one) - logits(other)).abs().max() <= 200 * torch.finfo(torch.float32).eps * logits(one).abs().max()


def into(*names):
    """Return a change that moves a folder's files into subfolders."""

    def move(folder):
        files = [path for path in folder.iterdir() if path.suffix != ".py"]
        for name in names:
            (folder / name).mkdir(parents=True)
            for path in files:
                shutil.copy(path, folder / name)
        for path in files:
            path.unlink()

    return move


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


CODE = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C"}}
TOKENIZER_CODE = {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 28270510\n"
PAGE = b"<!doctype html>\n<html>\n" + b" " * 2000
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "uer/gpt2"})
GPT2_FOLDERS = {  # name: (the change to the folder, part of the error, or None if it still opens)
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "weights cut off": (lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:-200]), "can't be loaded"),
    "half of the weights": (without_last_block, "it lacks transformer.h.1.attn.c_attn.bias"),
    "config of a wider model": (lambda f: edit(f, n_embd=64), "their shapes don't match config.json"),
    "no vocabulary": (lambda f: (f / "vocab.txt").unlink(), "no tokenizer in"),
    "vocabulary too long": (lambda f: (f / "vocab.txt").open("a").write("a\nb\n"), "has 45 tokens, .* model has 43"),
    "vocabulary too short": (lambda f: edit(f, vocab_size=176), "has 43 tokens, but the model has 176"),
    "code for a config": (lambda f: edit(f, model_type="evil", **CODE), "config.json can't be loaded"),
    "unneeded code": (lambda f: edit(f, **CODE), None),
    "an attention kernel": (lambda f: edit(f, attn_implementation="evil/kernel"), None),
    "code in weights": (lambda f: torch.save({"a": Evil()}, f / BIN), "can't be loaded"),
    "pointer": (lambda f: (f / BIN).write_bytes(POINTER), f"{BIN} is a git-lfs pointer.*git lfs pull.*hf download`$"),
    "extra pointer": (lambda f: (f / SAFE).write_bytes(POINTER), f"{SAFE} is a git-lfs.*remove {SAFE} to load {BIN}"),
    "pointer as vocabulary": (lambda f: (f / "vocab.txt").write_bytes(POINTER), "vocab.txt is a git-lfs pointer"),
    "web page": (lambda f: (f / BIN).write_bytes(PAGE), f"{BIN} is a web page"),
    "one of two broken": (lambda f: (f / SAFE).write_bytes(b"cut off"), f"; or remove {SAFE} to load {BIN} instead"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text(ADAPTER), "LORA .*uer/gpt2.*merge_and_unload.*remove"),
    "checkpoints": (into("checkpoint-500", "checkpoint-1000"), "no config.json; did you mean .*/checkpoint-1000\\?"),
    "a run": (lambda f: (into("model")(f), (f / "config.json").write_text("{}")), "did you mean .*/model/model\\?"),
    "cache": (into("snapshots/12ab"), "did you mean .*snapshots/12ab\\?"),
}
OTHER_TOKENIZER = {"tokenizer_class": "C"} | TOKENIZER_CODE
CLASSIFIER_FOLDERS = {
    "code for a tokenizer": (lambda f: edit(f, "tokenizer_config.json", **OTHER_TOKENIZER), "tokenizer .* be loaded"),
    "another vocabulary": (lambda f: (f / "vocab.txt").open("a").write("a\nb\n"), "has 45 tokens, .* model has 43"),
    "code for a classifier": (lambda f: edit(f, model_type="bert-generation", **CODE), "can't be loaded"),
    "only an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "adapter .* use that$"),
    "pointer for a classifier": (lambda f: (f / BIN).write_bytes(POINTER), f"{BIN} is a git-lfs pointer"),
}
CASES = [("gpt2", *case) for case in GPT2_FOLDERS.values()] + [("bert", *case) for case in CLASSIFIER_FOLDERS.values()]


@pytest.mark.parametrize(("kind", "change", "line"), CASES, ids=[*GPT2_FOLDERS, *CLASSIFIER_FOLDERS])
def test_a_bad_model_folder_gives_a_one_line_error_and_runs_no_code(
    gpt2_folder, classifier_folder, tmp_path, monkeypatch, kind, change, line
):
    good = gpt2_folder if kind == "gpt2" else classifier_folder
    load = load_gpt2 if kind == "gpt2" else lambda folder: SentimentReward(folder, "cpu")
    folder = shutil.copytree(good, tmp_path / "model")
    (folder / "evil.py").write_text("open('ran', 'w')\nclass C: pass\n")
    change(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    with pytest.raises(UserError, match=line) if line else contextlib.nullcontext() as error:
        load(folder)
    assert not line or ("\n" not in str(error.value) and str(folder) in str(error.value))
    assert os.listdir(tmp_path) == ["model"] and not (folder / "__pycache__").exists()


def test_a_published_gpt2_loads_silently_in_float32_with_a_zero_value_head(tmp_path, capfd):
    folder, verbosity = write_gpt2(tmp_path / "gpt2"), get_verbosity()
    edit(folder, dtype="bfloat16")
    model, _ = load_gpt2(folder)
    assert get_verbosity() == verbosity
    out, err = capfd.readouterr()
    assert out == err == ""
    assert not model.v_head.summary.weight.any() and not model.v_head.summary.bias.any()
    assert not model.training and model.dtype == torch.float32 and model.config.eos_token_id is None
    assert model.config._attn_implementation == "eager" and model.lm_head.weight is model.transformer.wte.weight


def test_apple_gpus_use_eager_attention_and_out_of_memory_is_not_blamed_on_the_files(gpt2_folder):
    config = models.load_gpt2_config(gpt2_folder)
    for device, kind in ("cpu", "sdpa"), ("mps", "eager"):
        model = models.load_weights(GPT2LMHeadModel, gpt2_folder, copy.deepcopy(config), device)
        assert model.config._attn_implementation == kind
    with pytest.raises(MemoryError), models.loading("it"):
        raise MemoryError


UNUSUAL = [{"activation_function": "gelu"}, {"tie_word_embeddings": False}]
UNUSUAL += [{"use_cache": False, "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 0}]


@pytest.mark.parametrize("change", UNUSUAL, ids=["gelu", "untied", "special tokens"])
def test_logits_match_plain_transformers_before_and_after_saving(tmp_path, change):
    folder = write_gpt2(tmp_path / "gpt2", tie_word_embeddings=change.get("tie_word_embeddings", True))
    edit(folder, **change)
    model, tokenizer = load_gpt2(folder)
    assert same_logits(model, plain(folder))
    assert (model.lm_head.weight is model.transformer.wte.weight) == change.get("tie_word_embeddings", True)
    models.save_policy(model, tokenizer, tmp_path / "saved", temperature=1.0, gen_len=8)
    again, _ = load_gpt2(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and same_logits(model, plain(tmp_path / "saved"))
    assert again.config.use_cache
    assert [getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")] == [None] * 3


def as_tokenizer_json(folder, named=None):
    """Replace vocab.txt with a tokenizer.json. named: the tokenizer class in tokenizer_config.json, or None."""
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    edit(folder, tokenizer_class=None)
    edit(folder, "tokenizer_config.json", tokenizer_class=named)
    (folder / "vocab.txt").unlink()
    if named is None:
        (folder / "tokenizer_config.json").unlink()


BERT_S = {
    "vocab.txt, no class": lambda f: [
        edit(f, g, tokenizer_class=None) for g in ("config.json", "tokenizer_config.json")
    ],
    "vocab.txt, another class": lambda f: edit(f, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
    "tokenizer.json, no class": as_tokenizer_json,
    "tokenizer.json, any class": lambda f: as_tokenizer_json(f, "PreTrainedTokenizerFast"),
    "tokenizer.json, GPT-2's class": lambda f: as_tokenizer_json(f, "GPT2Tokenizer"),
    "tokenizer.json, BERT's class": lambda f: as_tokenizer_json(f, "BertTokenizer"),
}


@pytest.mark.parametrize("change", BERT_S.values(), ids=BERT_S)
def test_a_wordpiece_vocabulary_gets_a_bert_tokenizer_whatever_class_is_named(tmp_path, change):
    folder = write_gpt2(tmp_path / "gpt2")
    change(folder)
    tokenizer = load_gpt2(folder)[1]
    assert models.encode_prompt(tokenizer, "刚收到good").tolist() == [2, 5, 6, 7, 41]
    assert models.decode(tokenizer, [torch.tensor([5, 6, 7, 41, 42, 3])]) == ["刚收到goods"]
    models.save_tokenizer(tokenizer, tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode([5, 6, 7, 41, 42]) == "刚收到goods"


def test_characters_are_joined_if_the_tokenizer_has_no_decoder(tmp_path):
    """The `tokenizers` library makes such a tokenizer if its tokens are whole characters."""
    folder = write_gpt2(tmp_path / "gpt2")
    as_tokenizer_json(folder, "PreTrainedTokenizerFast")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    characters = {"type": "WordLevel", "vocab": tokenizer["model"]["vocab"], "unk_token": "[UNK]"}
    edit(folder, "tokenizer.json", model=characters, decoder=None)
    assert models.decode(models.load_tokenizer(folder), [torch.tensor([5, 6, 7, 3])]) == ["刚收到"]


def add_bytes(folder, before=b"", after=b""):
    (folder / "vocab.txt").write_bytes(before + (folder / "vocab.txt").read_bytes() + after)


def name_tokens(folder, **names):
    edit(folder, "tokenizer_config.json", **names)


UNUSED = {
    "trailing blank lines": lambda f: add_bytes(f, after=b"\n \n"),
    "byte order mark": lambda f: add_bytes(f, before=b"\xef\xbb\xbf"),
    "unused words": lambda f: add_bytes(f, after=b"[unused1]\n[unused2]\n"),
    "an added token": lambda f: name_tokens(f, additional_special_tokens=["<user>"]),
    "an added end token": lambda f: name_tokens(f, eos_token="[EOS]"),
    "an added pad": lambda f: (name_tokens(f, pad_token="<pad>"), as_tokenizer_json(f, "PreTrainedTokenizerFast")),
    "no [MASK]": lambda f: (f / "vocab.txt").write_text((f / "vocab.txt").read_text().replace("[MASK]", "[unused1]")),
}


@pytest.mark.parametrize("change", UNUSED.values(), ids=UNUSED)
def test_empty_and_unused_tokens_that_the_model_lacks_are_removed(tmp_path, change):
    folder = write_gpt2(tmp_path / "gpt2")
    change(folder)
    trainer = TextPPOTrainer.from_pretrained(folder, PPOConfig(device="cpu", gen_len=8))
    queries = trainer.encode(["刚收到", "货"])
    assert [query.tolist() for query in queries] == [[2, 5, 6, 7], [2, 8]]
    assert trainer.tokenizer.sep_token_id == 3 and max(map(max, trainer.generate(queries * 8))) < 43
    assert trainer.never_sampled - {4} == {0, 1, 2}
    trainer.save(tmp_path / "saved")
    again = TextPPOTrainer.from_pretrained(tmp_path / "saved", PPOConfig(device="cpu"))
    assert again.encode(["刚收到"])[0].tolist() == [2, 5, 6, 7]


def save_by_transformers(folder):
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[BOS]", "eos_token": "[EOS]"})
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink()


def save_as_4_46(folder):
    tokens = {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    added = {str(i): {"content": token, "special": True} for i, token in enumerate(tokens.values(), 43)}
    name_tokens(folder, added_tokens_decoder=added, **tokens)
    (folder / "added_tokens.json").write_text('{"[BOS]": 43, "[EOS]": 44}')
    (folder / "generation_config.json").write_text('{"bos_token_id": 50256, "eos_token_id": 50256}')


def in_vocabulary(folder, file="config.json"):
    add_bytes(folder, after=b"[BOS]\n[EOS]\n")
    (folder / file).touch()
    settings = json.loads((folder / file).read_text() or "{}")
    (folder / file).write_text(json.dumps(settings | {"bos_token_id": 43, "eos_token_id": 44}))


OWN = {  # name: (the change to a folder of a model with 45 tokens, the tokens that start and end its texts)
    "saved by this version": (save_by_transformers, "[BOS]", "[EOS]"),
    "saved by 4.46": (save_as_4_46, "[BOS]", "[EOS]"),
    "special_tokens_map.json": (
        lambda f: (f / "special_tokens_map.json").write_text('{"bos_token": "[BOS]", "eos_token": "[EOS]"}'),
        "[BOS]",
        "[EOS]",
    ),
    "ids in config.json": (in_vocabulary, "[BOS]", "[EOS]"),
    "ids in generation_config.json": (lambda f: in_vocabulary(f, "generation_config.json"), "[BOS]", "[EOS]"),
    "only an end token": (lambda f: name_tokens(f, eos_token="</s>"), "[CLS]", "</s>"),
    "one token for both": (lambda f: name_tokens(f, bos_token="<|end|>", eos_token="<|end|>"), "<|end|>", "<|end|>"),
    "an end token that pads": (lambda f: name_tokens(f, eos_token="[EOS]", pad_token="[EOS]"), "[CLS]", "[EOS]"),
    "[PAD] as end token": (lambda f: name_tokens(f, bos_token="[UNK]", eos_token="[PAD]"), "[CLS]", "[SEP]"),
    "ids of padding": (lambda f: edit(f, bos_token_id=0, eos_token_id=0), "[CLS]", "[SEP]"),
    "ids of words": (lambda f: edit(f, bos_token_id=30, eos_token_id=31), "[CLS]", "[SEP]"),
    "ids of GPT-2": (lambda f: edit(f, bos_token_id=50256, eos_token_id=50256), "[CLS]", "[SEP]"),
}


@pytest.mark.parametrize(("change", "start", "end"), OWN.values(), ids=OWN)
def test_texts_start_and_end_with_the_tokens_named_in_the_folder(tmp_path, capfd, change, start, end):
    folder = write_gpt2(tmp_path / "gpt2", vocab_size=45)
    change(folder)
    trainer = TextPPOTrainer.from_pretrained(folder, PPOConfig(device="cpu", gen_len=16))
    line = f"gpt2: texts start with {start} and end with {end}\n"
    assert capfd.readouterr().out.count(line) == ((start, end) != ("[CLS]", "[SEP]"))
    first, last = trainer.tokenizer.convert_tokens_to_ids([start, end])
    query = trainer.encode(["刚收到"])[0]
    assert query.tolist() == [first, 5, 6, 7]
    responses = trainer.generate([query] * 32)
    assert {last} < {response[-1].item() for response in responses}
    assert not {0, 1, 2, 3, 4, first}.difference([last]).intersection(torch.cat(responses).tolist())
    assert not any(token in text for text in trainer.decode(responses) for token in ("[", "]", "<", ">"))
    with pytest.raises(UserError, match="special token"):
        trainer.encode(["刚[SEP]"])

    trainer.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (first, last) and last not in settings[
        "suppress_tokens"
    ]
    assert {0, 1, 2, 3, 4, first} - {last} <= set(settings["suppress_tokens"])
    again = TextPPOTrainer.from_pretrained(tmp_path / "saved", PPOConfig(device="cpu"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("刚收到").input_ids == again.encode(["刚收到"])[0].tolist()
    assert again.tokenizer.sep_token == end and again.never_sampled == trainer.never_sampled


@pytest.fixture
def saved(policy, tmp_path):
    model, tokenizer = policy
    torch.nn.init.normal_(model.v_head.summary.weight)
    torch.nn.init.ones_(model.v_head.summary.bias)
    models.save_policy(model, tokenizer, tmp_path / "saved", temperature=0.7, gen_len=9, values=(0.5, 8.0))
    return model, tokenizer, tmp_path / "saved"


def test_plain_transformers_opens_a_saved_folder_with_the_runs_settings(saved, capfd):
    """It uses neither the library's top-k of 50 nor greedy search. [CLS] starts, [SEP] ends and [PAD] pads a text."""
    model, _, folder = saved
    capfd.readouterr()
    assert same_logits(model, plain(folder)) and capfd.readouterr().out == ""
    assert not getattr(model.config, "task_specific_params", None)  # your own loop keeps using this model
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["task_specific_params"]["text-generation"] == {"max_new_tokens": 9, "temperature": 0.7}  # for 4.57
    settings = json.loads((folder / "generation_config.json").read_text())
    del settings["transformers_version"]
    expected = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 9}
    expected |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "suppress_tokens": [0, 1, 2, 4]}
    assert settings == expected


def test_a_batch_of_prompts_gives_the_same_completions_as_single_prompts(saved):
    """Plain transformers can complete prompts of different lengths. The names of the special tokens are saved, too."""
    _, _, folder = saved
    tokenizer, model = AutoTokenizer.from_pretrained(folder), plain(folder)

    def complete(prompts):
        return tokenizer.batch_decode(
            model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), do_sample=False),
            skip_special_tokens=True,
        )

    prompts = ["刚收到货,感觉", "衣服"]
    assert complete(prompts) == [text for prompt in prompts for text in complete([prompt])]
    names = json.loads((folder / "tokenizer_config.json").read_text())
    assert [names[f"{name}_token"] for name in ("bos", "eos", "pad")] == ["[CLS]", "[SEP]", "[PAD]"]


def test_the_files_of_a_run_respect_the_umask(policy, tmp_path, without_pictures):
    before = os.umask(0o027)
    try:
        assert tiny_run(tmp_path / "run", policy) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".pt", ".json"}
    assert [path for path in files if path.stat().st_mode & 0o777 != 0o640] == []


def test_the_pipeline_samples_from_a_prompt_like_training(saved):
    model, tokenizer, folder = saved
    generator = pipeline("text-generation", model=str(folder))
    seen = []
    forward = generator.model.forward
    generator.model.forward = lambda *args, **kwargs: (seen.append(kwargs["input_ids"]), forward(*args, **kwargs))[1]
    texts = [text[0]["generated_text"] for text in generator(["刚收到货,感觉"] * 40, return_full_text=False)]
    assert seen[0][0].tolist() == models.encode_prompt(tokenizer, "刚收到货,感觉").tolist()
    assert len(set(texts)) > 10 and max(len(tokenizer.tokenize(text)) for text in texts) == 9
    assert not any(token in text for text in texts for token in ("[UNK]", "[MASK]", "[CLS]", "##"))
    names = json.loads((folder / "tokenizer_config.json").read_text())["model_input_names"]
    assert names == ["input_ids", "attention_mask"]  # GPT-2 would add embeddings for token types


def test_a_saved_tokenizer_encodes_and_decodes_like_the_original(saved, tmp_path):
    """This holds in plain transformers and in this program, saved once or twice, for any sequence of tokens."""
    _, tokenizer, folder = saved
    models.save_tokenizer(models.load_tokenizer(folder), tmp_path / "twice")
    shutil.copy(folder / "config.json", tmp_path / "twice")
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(43, (9,), generator=generator) for _ in range(100)]
    sequences += [torch.tensor([41, 41, 5, 41]), torch.tensor([42, 42, 6]), torch.tensor([41, 42, 11, 42])]
    texts = models.decode(tokenizer, sequences)
    assert texts[-3:] == ["good good刚good", "ss收", "goods觉s"]
    for place in (folder, tmp_path / "twice"):
        plain, again = AutoTokenizer.from_pretrained(place), models.load_tokenizer(place)
        assert plain.batch_decode(sequences, skip_special_tokens=True) == texts == models.decode(again, sequences)
        prompt = models.encode_prompt(tokenizer, "刚收到,goods").tolist()
        assert prompt == models.encode_prompt(again, "刚收到,goods").tolist() == plain.encode("刚收到,goods")
        assert again.get_vocab() == tokenizer.get_vocab() and set(again.all_special_ids) == {0, 1, 2, 3, 4}


def test_a_byte_level_tokenizer_starts_and_ends_texts_with_its_own_token(tmp_path):
    trainer = TextPPOTrainer.from_pretrained(write_bpe_gpt2(tmp_path / "gpt2"), PPOConfig(device="cpu", gen_len=24))
    plain = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    end = plain.eos_token_id
    prompts = ["this film was", "刚收到货,感觉很"]
    queries = trainer.encode(prompts)
    assert [query.tolist() for query in queries] == [[end, *plain.encode(prompt)] for prompt in prompts]
    good = [torch.tensor(plain.encode(text) + [end]) for text in (" great, truly", "不错")]
    assert trainer.decode(queries, good) == ["this film was great, truly", "刚收到货,感觉很不错"]
    assert trainer.decode(queries[1:], [good[1][:-2]])[0] in (
        "刚收到货,感觉很不",
        "刚收到货,感觉很",
    )  # cut inside a character
    stats = trainer.step(queries[:1] * 3, [good[0], good[0][:-1], good[1][:2]], [0.1, 0.5, 0.9])
    assert stats["tokens/ended_share"] == pytest.approx(1 / 3)

    trainer.save(tmp_path / "saved")
    again = TextPPOTrainer.from_pretrained(tmp_path / "saved", PPOConfig(device="cpu"))
    assert again.encode(prompts)[0].tolist() == queries[0].tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(prompts[0]) == queries[0].tolist()

    edit(tmp_path / "gpt2", "tokenizer_config.json", bos_token="a")  # starts texts, but doesn't end them
    other = models.load_tokenizer(tmp_path / "gpt2")
    assert [other.cls_token, other.sep_token, other.pad_token] == ["a", plain.eos_token, plain.eos_token]


def test_padding_rows_of_the_embeddings_are_never_sampled(tmp_path):
    trainer = TextPPOTrainer.from_pretrained(write_gpt2(tmp_path / "gpt2", vocab_size=64), PPOConfig(device="cpu"))
    with torch.no_grad():
        embeddings = trainer.model.transformer.wte.weight
        embeddings[50] = embeddings[5] * 9  # would be a likely token
    assert torch.cat(trainer.generate([[2, 5, 6]] * 64)).max() < 43
    trainer.save(tmp_path / "saved")
    suppressed = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == [0, 1, 2, 4, *range(43, 64)]


def test_decoded_tokens_are_joined_into_natural_text():
    for decoded, text in {
        "[CLS] 刚 收 到 [MASK] 货 [UNK]": "刚收到货",
        "good phone 很 好 用 5 星": "good phone很好用5星",
        "4 . 5 Z 9": "4.5 Z 9",
        "##韩 国 ##": "韩国##",
    }.items():
        assert models.clean_text(decoded) == text == models.clean_text(text)


def test_an_encoded_prompt_has_a_start_token_but_no_end_token(policy):
    ids = models.encode_prompt(policy[1], "刚收到,goods")
    assert ids.dtype == torch.int64 and ids.tolist() == [2, 5, 6, 7, 9, 41, 42]
    sequences = [ids, torch.tensor([14, 3]), torch.tensor([41, 3, 0, 0]), torch.tensor([3])]
    assert models.decode(policy[1], sequences) == ["刚收到,goods", "错", "good", ""]


def test_a_prompt_with_unknown_or_special_tokens_is_rejected(gpt2_folder, tmp_path):
    """Like the article's tokenizer, this one keeps capital letters, which aren't in its vocabulary."""
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    edit(folder, "tokenizer_config.json", do_lower_case=False)
    tokenizer = models.load_tokenizer(folder)
    for prompt, word in ("衣服Good", "'Good'"), ("衣服[SEP]", "'\\[SEP\\]'"):
        with pytest.raises(UserError, match=f"{word} in the prompt .* isn't in the vocabulary, or is a special token"):
            models.encode_prompt(tokenizer, prompt)
