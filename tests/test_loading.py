"""Loading published layouts and saving what plain transformers opens."""

import json
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from config import PPOConfig, UserError
from support import models
from support.text_trainer import TextPPOTrainer
from tests.conftest import write_gpt2


def load(folder):
    return models.load_policy(folder, models.load_gpt2_config(folder))


@pytest.fixture
def saved(policy, tmp_path):
    model, tokenizer = policy
    torch.nn.init.normal_(model.v_head.summary.weight)
    models.save_policy(model, tokenizer, tmp_path / "saved", temperature=0.7)
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
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]
    for (name, old), new in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(old, new), name


def test_saved_folder_opens_in_plain_transformers_with_the_same_logits(saved):
    model, tokenizer, folder = saved
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.sep_token_id and config["pad_token_id"] == tokenizer.pad_token_id
    assert config["suppress_tokens"] == [0, 1, 2, 4] and config["temperature"] == 0.7
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_pipeline_as_in_the_readme_encodes_a_prompt_as_training_did(saved):
    model, _, folder = saved
    generator = pipeline("text-generation", model=str(folder))
    seen = []
    forward = generator.model.forward
    generator.model.forward = lambda *args, **kwargs: (seen.append(kwargs["input_ids"]), forward(*args, **kwargs))[1]
    texts = generator(["[CLS]刚收到货,感觉"] * 40, add_special_tokens=False, max_new_tokens=8, return_full_text=False)
    assert seen[0][0].tolist() == models.encode_prompt(AutoTokenizer.from_pretrained(folder), "刚收到货,感觉").tolist()
    assert len({text[0]["generated_text"] for text in texts}) > 10
    assert not any(token in text[0]["generated_text"] for text in texts for token in ("[UNK]", "[MASK]", "[CLS]"))


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
            "not a whole GPT-2",
        ),
        (lambda f: write_gpt2(f, n_embd=16) and shutil.copy(f.parent / "config.json", f), "cannot be loaded"),
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
    (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        models.load_tokenizer(folder)


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
        models.save_policy(model, tokenizer, tmp_path / "saved", temperature=1.0)
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
    config = json.loads((folder / "config.json").read_text()) | {"add_cross_attention": True}
    (folder / "config.json").write_text(json.dumps(config))
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


def write_bpe_gpt2(folder):
    """A random GPT-2 with a byte-level BPE tokenizer trained on the spot, in the files of English `gpt2`."""
    folder = write_gpt2(folder, vocab_size=300)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["刚收到货,感觉很不错", "this film was great, truly"] * 9, 299, 2, False, ["<|endoftext|>"])
    bpe.save_model(str(folder))
    (folder / "vocab.txt").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["tokenizer_class"]
    size = bpe.get_vocab_size()
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    weights = torch.load(folder / "pytorch_model.bin")
    weights |= {name: weights[name][:size] for name in ("transformer.wte.weight", "lm_head.weight")}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


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

    responses = trainer.generate(queries * 16)
    ended = [response for response in responses if response[-1] == end]
    assert ended and all((response[:-1] != end).all() for response in responses)
    stats = trainer.step(queries * 16, responses, torch.arange(32) / 32)
    assert stats["tokens/ended_share"] == pytest.approx(len(ended) / 32)
    assert stats["ppo/policy/clipfrac"] >= 0 and trainer.n_steps == 1
    trainer.save(tmp_path / "saved")
    again = TextPPOTrainer.from_pretrained(tmp_path / "saved", PPOConfig(device="cpu"))
    assert [query.tolist() for query in again.encode(["this film was"])] == [queries[0].tolist()]


def test_embeddings_padded_beyond_the_tokenizer(tmp_path):
    """The rows that pad are neither sampled here nor by plain transformers."""
    folder = write_gpt2(tmp_path / "gpt2", vocab_size=64)
    trainer = TextPPOTrainer.from_pretrained(folder, PPOConfig(device="cpu"))
    with torch.no_grad():
        trainer.model.transformer.wte.weight[50] = trainer.model.transformer.wte.weight[5] * 9  # a likely token, else
    responses = torch.cat(trainer.generate([[2, 5, 6]] * 64))
    assert responses.max() < 43 < trainer.restriction.numel() == 64
    with pytest.raises(ValueError, match="response 0 holds id 50"):
        trainer.step([[2, 5]], [[50]], [0.5])
    trainer.save(tmp_path / "saved")
    suppressed = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == [0, 1, 2, 4, *range(43, 64)]


def test_a_bare_vocabulary_is_bert_s(tmp_path):
    """config.json without a tokenizer's class beside vocab.txt, and nothing else."""
    folder = write_gpt2(tmp_path / "gpt2")
    (folder / "tokenizer_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["tokenizer_class"]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = models.load_tokenizer(folder)
    assert models.encode_prompt(tokenizer, "刚收到货").tolist() == [2, 5, 6, 7, 8]
