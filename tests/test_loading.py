"""Loading published layouts and saving what plain transformers opens."""

import json
import re
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from config import PPOConfig
from support import models
from support.errors import UserError, first_line
from support.text_trainer import TextPPOTrainer, read_policy_folder
from tests.helpers import write_bpe_gpt2, write_gpt2


def load(folder):
    return models.load_policy(folder, models.load_gpt2_config(folder))


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def saved(policy, tmp_path):
    model, tokenizer = policy
    torch.nn.init.normal_(model.v_head.summary.weight)
    models.save_policy(model, tokenizer, tmp_path / "saved", temperature=0.7, gen_len=9)
    return model, tokenizer, tmp_path / "saved"


def test_published_layout_loads_with_one_quiet_line(gpt2_folder, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(gpt2_folder)
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and "value head" in out and err == ""
    assert (model.v_head.summary.weight == 0).all() and (model.v_head.summary.bias == 0).all()
    assert not model.training and model.dtype == torch.float32
    assert model.config.eos_token_id is None and model.config.bos_token_id is None


def test_special_tokens_and_cache_of_a_published_config_do_not_count(tmp_path):
    folder = write_gpt2(tmp_path / "gpt2")
    edit_config(folder, use_cache=False, bos_token_id=50256, eos_token_id=50256, pad_token_id=0)
    config = models.load_gpt2_config(folder)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert config.use_cache is True


@pytest.mark.parametrize(
    ("activation", "loaded"), [("gelu_new", "gelu_pytorch_tanh"), ("relu", "relu"), ("gelu", "gelu")]
)
def test_an_activation_stays_the_function_that_it_is(tmp_path, activation, loaded):
    folder = write_gpt2(tmp_path / "gpt2")
    edit_config(folder, activation_function=activation)
    assert models.load_gpt2_config(folder).activation_function == loaded
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.allclose(load(folder)(ids).logits, plain(ids).logits, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_train_and_are_saved_in_float32(tmp_path, stored):
    folder = write_gpt2(tmp_path / "gpt2")
    weights = {name: weight.to(stored) for name, weight in torch.load(folder / "pytorch_model.bin").items()}
    torch.save(weights, folder / "pytorch_model.bin")
    edit_config(folder, dtype=str(stored).removeprefix("torch."))
    model = load(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(model.state_dict()[name], weights[name].float())
    models.save_policy(model, models.load_tokenizer(folder), tmp_path / "saved", temperature=1.0, gen_len=8)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32


def test_attention_is_the_faster_one_of_each_device(gpt2_folder):
    on_cpu = models.load_policy(gpt2_folder, models.load_gpt2_config(gpt2_folder))
    elsewhere = models.load_policy(gpt2_folder, models.load_gpt2_config(gpt2_folder), "meta")
    assert on_cpu.config._attn_implementation == "eager" and elsewhere.config._attn_implementation == "sdpa"
    assert elsewhere.device == torch.device("meta")


@pytest.mark.parametrize(
    "model_class", [models.GPT2HeadWithValueModel, AutoModelForSequenceClassification], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize(("device", "attention"), [("mps", "eager"), ("mps:0", "eager"), ("cuda", "sdpa")])
def test_an_apple_gpu_s_own_attention_is_used_for_neither_model(
    gpt2_folder, classifier_folder, model_class, device, attention
):
    folder = gpt2_folder if model_class is models.GPT2HeadWithValueModel else classifier_folder
    model, _ = models.load_weights(model_class, folder, models.read_model_config(folder), torch.device(device))
    assert model.config._attn_implementation == attention


def test_loading_leaves_the_library_as_loud_as_it_was(gpt2_folder, tmp_path):
    was = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.INFO)
    transformers_logging.enable_progress_bar()
    load(gpt2_folder)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError):
        load(tmp_path)
    now = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(was[0])
    assert now == (transformers_logging.INFO, True)


def test_logits_are_those_of_plain_transformers(gpt2_folder):
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    ids = torch.tensor([[2, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.allclose(load(gpt2_folder)(ids).logits, plain(ids).logits, atol=1e-5)


def test_saved_folder_opens_here_value_head_included(saved, capfd):
    model, _, folder = saved
    capfd.readouterr()
    again = load(folder)
    assert capfd.readouterr().out == ""
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors", "value_head.safetensors"]
    for (name, old), new in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(old, new), name


def test_folder_of_an_earlier_version_opens_with_the_value_head_among_its_weights(saved):
    model, _, folder = saved
    (folder / "value_head.safetensors").unlink()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    head = {name: weight for name, weight in model.state_dict().items() if name.startswith("v_head.")}
    safetensors.torch.save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(folder).v_head.summary.weight, model.v_head.summary.weight)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"summary.weight": torch.zeros(1, 31), "summary.bias": torch.zeros(1)}, "is no value head of this model"),
        ({"summary.weight": torch.zeros(1, 32)}, "is no value head of this model"),
        (
            {"summary.weight": torch.zeros(1, 32), "summary.bias": torch.full((1,), torch.nan)},
            "hold NaN or infinity, first in v_head.summary.bias",
        ),
    ],
    ids=["other shape", "half of it", "broken"],
)
def test_a_value_head_that_does_not_fit_is_told(saved, head, said):
    _, _, folder = saved
    safetensors.torch.save_file(head, folder / "value_head.safetensors")
    with pytest.raises(UserError, match=said) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_saved_folder_opens_in_plain_transformers_with_the_same_logits(saved, capfd):
    model, tokenizer, folder = saved
    capfd.readouterr()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    out, err = capfd.readouterr()
    assert out == "" and "v_head" not in err and "UNEXPECTED" not in err and "MISSING" not in err
    ids = torch.tensor([[2, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["task_specific_params"] == {"text-generation": {"max_new_tokens": 9}}
    again = AutoTokenizer.from_pretrained(folder)
    assert again.get_vocab() == tokenizer.get_vocab() and again.encode("刚收到goods") == [2, 5, 6, 7, 41, 42]
    assert again.model_max_length == tokenizer.model_max_length


def test_saved_generation_settings_draw_from_the_distribution_of_the_run(saved):
    """Neither the library's top-k of 50 nor its greedy search; [CLS] begins, [SEP] ends, [PAD] fills up."""
    _, _, folder = saved
    settings = json.loads((folder / "generation_config.json").read_text())
    del settings["transformers_version"]
    assert settings == {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 9,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "suppress_tokens": [0, 1, 2, 4],
    }


@pytest.mark.parametrize("as_once", [False, True], ids=["prompt alone", "as the README once said"])
def test_pipeline_encodes_a_prompt_as_training_did(saved, as_once):
    model, tokenizer, folder = saved
    generator = pipeline("text-generation", model=str(folder))
    seen = []
    forward = generator.model.forward
    generator.model.forward = lambda *args, **kwargs: (seen.append(kwargs["input_ids"]), forward(*args, **kwargs))[1]
    given = ("[CLS]刚收到货,感觉", {"add_special_tokens": False}) if as_once else ("刚收到货,感觉", {})
    texts = [text[0]["generated_text"] for text in generator([given[0]] * 40, return_full_text=False, **given[1])]
    assert seen[0][0].tolist() == models.encode_prompt(tokenizer, "刚收到货,感觉").tolist()
    assert len(set(texts)) > 10 and max(len(tokenizer.tokenize(text)) for text in texts) == 9
    assert not any(token in text for text in texts for token in ("[UNK]", "[MASK]", "[CLS]", "##"))
    assert all(re.fullmatch("[a-z]", text[i - 1] + text[i + 1]) for text in texts for i in find_spaces(text))


def find_spaces(text):
    return [i for i, character in enumerate(text) if character == " "]


def test_a_saved_tokenizer_encodes_and_decodes_as_the_one_that_it_was(saved, tmp_path):
    """In plain transformers, and here, saved once or twice; whatever tokens follow one another."""
    _, tokenizer, folder = saved
    once = models.load_tokenizer(folder)
    models.save_tokenizer(once, tmp_path / "twice")
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
        assert again.get_vocab() == tokenizer.get_vocab() and again.all_special_ids == tokenizer.all_special_ids


def test_a_saved_tokenizer_hands_gpt2_no_token_types(saved):
    """GPT-2 would add the embedding of token 0 to every position for them."""
    _, _, folder = saved
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("刚收到货", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, plain(inputs.input_ids).logits)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "no readable model config"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "type 'bert'"),
        (lambda f: (f / "pytorch_model.bin").unlink(), "no weights"),
        (
            lambda f: (f / "pytorch_model.bin").write_bytes((f / "pytorch_model.bin").read_bytes()[:5000]),
            "cannot be loaded",
        ),
        (
            lambda f: torch.save({"transformer.ln_f.bias": torch.zeros(32)}, f / "pytorch_model.bin"),
            "it has 2 layers, they are 1 tensors",
        ),
        (lambda f: write_gpt2(f, n_embd=16) and shutil.copy(f.parent / "config.json", f), "do not belong together"),
    ],
    ids=[
        "no config",
        "broken config",
        "other architecture",
        "no weights",
        "truncated weights",
        "weights missing",
        "other shape",
    ],
)
def test_unusable_folders_are_named_in_one_line(gpt2_folder, tmp_path, damage, said):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    shutil.copy(folder / "config.json", tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_unusable_tokenizers_are_named(gpt2_folder, tmp_path):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=f"^the tokenizer in {folder} cannot be loaded") as error:
        models.load_tokenizer(folder)
    assert "\n" not in str(error.value)
    (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match=f"^no tokenizer in {folder}: it needs vocab.txt, tokenizer.json, or "):
        models.load_tokenizer(folder)


def test_an_error_is_one_short_line():
    assert first_line(KeyError("\n  missing \n more")) == "KeyError: '\\n  missing \\n more'"
    assert first_line(ValueError(" first\nsecond")) == "ValueError: first"
    assert first_line(ValueError("x" * 500)) == "ValueError: " + "x" * 188


def test_weights_that_do_not_fit_into_memory_are_not_called_damaged(gpt2_folder, monkeypatch):
    monkeypatch.setattr(models.GPT2HeadWithValueModel, "from_pretrained", lambda *args, **options: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load(gpt2_folder)


def test_the_first_weight_that_lacks_is_named(tmp_path):
    folder = write_gpt2(tmp_path / "gpt2")
    weights = torch.load(folder / "pytorch_model.bin")
    del weights["transformer.h.1.ln_2.bias"], weights["transformer.h.0.ln_1.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=f"^the weights in {folder} lack transformer.h.0.ln_1.weight: not a whole GPT-2"
    ):
        load(folder)


@pytest.mark.parametrize(("rows", "fit"), [(42, False), (43, True), (48, True), (175, True), (176, False)])
def test_embeddings_have_a_tenth_and_128_rows_more_than_tokens_at_most(gpt2_folder, tmp_path, rows, fit):
    """43 tokens; 1.1 * 43 + 128 = 175.3."""
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    edit_config(folder, vocab_size=rows)
    if fit:
        assert read_policy_folder(folder)[0].vocab_size == rows
    else:
        said = f"the tokenizer in {folder} has 43 tokens, the model {rows}: they do not belong together"
        with pytest.raises(UserError, match=f"^{said}$"):
            read_policy_folder(folder)


# --- texts and tokens


@pytest.mark.parametrize(
    ("decoded", "text"),
    [
        ("很 不 错 , 好 评 [SEP] [PAD] [PAD]", "很不错,好评"),
        ("[CLS] 刚 收 到 [MASK] 货 [UNK]", "刚收到货"),
        ("good phone 很 好 用 5 星", "good phone很好用5星"),
        ("质 量 iphone 6 plus", "质量iphone 6 plus"),
        ("a\n\tb", "a b"),
        ("4 . 5 Z 9", "4.5 Z 9"),
        ("##韩 国 ##", "韩国##"),
        ("[SEPT] [cls]", "[SEPT][cls]"),
        ("  ", ""),
        ("", ""),
    ],
)
def test_decoded_tokens_are_joined_as_people_write_them(decoded, text):
    assert models.clean_text(decoded) == text
    assert models.clean_text(text) == text


def test_a_prompt_begins_a_text_and_does_not_end_it(policy):
    tokenizer = policy[1]
    ids = models.encode_prompt(tokenizer, "刚收到,goods")
    assert ids.dtype == torch.int64 and ids.tolist() == [2, 5, 6, 7, 9, 41, 42]
    sequences = [ids, torch.tensor([14, 3]), torch.tensor([41, 3, 0, 0]), torch.tensor([41, 41]), torch.tensor([3])]
    assert models.decode(tokenizer, sequences) == ["刚收到,goods", "错", "good", "good good", ""]


def test_one_matrix_stays_one_where_a_file_holds_it_twice(gpt2_folder):
    model = load(gpt2_folder)
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(torch.load(gpt2_folder / "pytorch_model.bin"))
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("frozen_share", [0.0, 0.5])
def test_an_output_matrix_of_its_own_is_kept(tmp_path, frozen_share):
    """tie_word_embeddings off: the logits of transformers, frozen with the embeddings, and saved whole."""
    folder = write_gpt2(tmp_path / "gpt2", tie_word_embeddings=False)
    model, tokenizer = load(folder), models.load_tokenizer(folder)
    ids = torch.tensor([[2, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
        assert not torch.allclose(model.lm_head.weight, model.transformer.wte.weight)
        model.freeze(frozen_share)
        assert model.lm_head.weight.requires_grad == (frozen_share == 0)
        models.save_policy(model, tokenizer, tmp_path / "saved", temperature=1.0, gen_len=8)
        assert torch.allclose(load(tmp_path / "saved")(ids).logits, plain, atol=1e-5)
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, plain, atol=1e-5)


def test_broken_weights_are_told(tmp_path):
    folder = write_gpt2(tmp_path / "gpt2")
    weights = torch.load(folder / "pytorch_model.bin")
    weights["transformer.h.1.ln_1.bias"][3] = torch.nan
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"NaN or infinity, first in transformer.h.1.ln_1.bias"):
        load(folder)


def test_cross_attention_is_refused(tmp_path):
    folder = write_gpt2(tmp_path / "gpt2")
    edit_config(folder, add_cross_attention=True)
    with pytest.raises(UserError, match="cross-attention"):
        load(folder)


def test_weights_that_are_slices_of_larger_ones_can_be_saved_again(tmp_path):
    """As a vocabulary cut short leaves them: torch saves the whole tensor with its slice."""
    folder = write_gpt2(tmp_path / "gpt2")
    weights = torch.load(folder / "pytorch_model.bin")
    longer = torch.cat([weights["transformer.wte.weight"], torch.zeros(9, 32)])
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = longer[:-9]
    torch.save(weights, folder / "pytorch_model.bin")
    safetensors.torch.save_model(load(folder), tmp_path / "again.safetensors")


# --- other tokenizers


def test_a_byte_level_tokenizer_starts_and_ends_texts_with_its_own_token(tmp_path):
    """Its <|endoftext|> stands before a prompt, ends a completion and pads; texts keep their spaces and characters."""
    trainer = TextPPOTrainer.from_pretrained(write_bpe_gpt2(tmp_path / "gpt2"), PPOConfig(device="cpu", gen_len=24))
    plain = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    end = plain.eos_token_id
    queries = trainer.encode(["this film was", "刚收到货,感觉很"])
    assert [query.tolist() for query in queries] == [
        [end, *plain.encode(t)] for t in ("this film was", "刚收到货,感觉很")
    ]
    good = [torch.tensor(plain.encode(text) + [end]) for text in (" great, truly", "不错")]
    assert trainer.decode(queries, good) == ["this film was great, truly", "刚收到货,感觉很不错"]
    assert trainer.decode(queries[1:], [good[1][:-2]])[0] in (
        "刚收到货,感觉很不",
        "刚收到货,感觉很",
    )  # half a character

    responses = trainer.generate(queries * 2 + trainer.encode([""]))
    assert all((response[:-1] != end).all() for response in responses)
    assert all(len(response) == 24 or response[-1] == end for response in responses)
    stats = trainer.step(queries[:1] * 3, [good[0], good[0][:-1], good[1][:2]], [0.1, 0.5, 0.9])
    assert stats["tokens/ended_share"] == pytest.approx(1 / 3)
    trainer.save(tmp_path / "saved")
    again = TextPPOTrainer.from_pretrained(tmp_path / "saved", PPOConfig(device="cpu"))
    assert [query.tolist() for query in again.encode(["this film was"])] == [queries[0].tolist()]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("this film was") == plain.encode("this film was")


def test_embeddings_padded_beyond_the_tokenizer(tmp_path):
    """The rows that pad are neither sampled here nor by plain transformers."""
    folder = write_gpt2(tmp_path / "gpt2", vocab_size=64)
    trainer = TextPPOTrainer.from_pretrained(folder, PPOConfig(device="cpu"))
    with torch.no_grad():
        trainer.model.transformer.wte.weight[50] = trainer.model.transformer.wte.weight[5] * 9  # a likely token, else
    responses = torch.cat(trainer.generate([[2, 5, 6]] * 64))
    assert responses.max() < 43 < trainer.engine.restriction.numel() == 64
    with pytest.raises(ValueError, match="response 0 holds id 50"):
        trainer.step([[2, 5]], [[50]], [0.5])
    trainer.save(tmp_path / "saved")
    suppressed = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == [0, 1, 2, 4, *range(43, 64)]


@pytest.mark.parametrize(
    ("name", "other"), [("cls_token", "bos_token"), ("sep_token", "eos_token"), ("pad_token", "eos_token")]
)
def test_a_text_needs_a_start_and_an_end(tmp_path, name, other):
    folder = write_bpe_gpt2(tmp_path / "gpt2")
    bpe = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    bpe.save(str(folder / "tokenizer.json"))
    own = {token: "film" for token in ("cls_token", "sep_token", "pad_token") if token != name}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **own}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    said = f"the tokenizer in {folder} has neither {name} nor {other}; a text needs a start and an end"
    with pytest.raises(UserError, match=f"^{said}$"):
        models.load_tokenizer(folder)


@pytest.mark.parametrize("note", ["config.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_named_is_that_one(gpt2_folder, tmp_path, note):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text()) | {"tokenizer_class": None}
        (folder / name).write_text(json.dumps(values | ({"tokenizer_class": "BertTokenizer"} if name == note else {})))
    assert not models.is_bare_chinese_gpt2(folder)
    assert isinstance(models.load_tokenizer(folder), BertTokenizer)


def test_a_bare_vocabulary_is_bert_s(tmp_path):
    """config.json without a tokenizer's class beside vocab.txt, and nothing else."""
    folder = write_gpt2(tmp_path / "gpt2")
    (folder / "tokenizer_config.json").unlink()
    edit_config(folder, tokenizer_class=None)
    tokenizer = models.load_tokenizer(folder)
    assert models.encode_prompt(tokenizer, "刚收到货").tolist() == [2, 5, 6, 7, 8]
