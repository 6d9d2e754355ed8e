"""Open and save models and tokenizers in the Hugging Face file layout. Code in a model folder never runs."""

import contextlib
import copy
import hashlib
import json
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from gpt2_value_head import GPT2HeadWithValueModel, never_sampled_ids, special_ids
from support.common.errors import UserError, first_line, is_out_of_memory
from support.models.hub import VALUE_HEAD, check_folder, has_vocabulary, second_weights

SPECIAL_TOKENS = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK)\]")
OWN_WORDS = ("RoFormer", "BertJapanese")  # tokenizers that split a text into words before they look up vocab.txt
PAD_OR_UNKNOWN = re.compile(r"\W*(pad|unk)\w*\W*", re.IGNORECASE)
SPACE_BETWEEN_CHARACTERS = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")


def load_tokenizer(folder: Path):
    """Return the tokenizer of a GPT-2's folder: BERT's (Chinese GPT-2 has it) or a byte-level BPE (other GPT-2).

    cls_token starts a text and sep_token ends it. bos_token and eos_token take these roles if the folder names them and
    they aren't the padding or unknown token. Raises UserError if the tokenizer is missing, broken, lacks such tokens or
    doesn't fit the model.
    """
    tokenizer = open_tokenizer(folder, read_model_config(folder))
    # GPT2Config fills in 50256, which may be an ordinary word here: ids only count if they look like special tokens
    names = {i: token for token, i in tokenizer.get_vocab().items() if re.fullmatch(r"[<\[].+[>\]]", token)}
    with loading(f"the settings in {folder}"):
        files = [folder / name for name in ("generation_config.json", "config.json")]
        settings = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    for role, other in (("cls_token", "bos_token"), ("sep_token", "eos_token")):
        candidates = [getattr(tokenizer, other)]
        candidates += [names.get(i) for i in (values.get(f"{other}_id") for values in settings) if isinstance(i, int)]
        named = [token for token in candidates if token and not PAD_OR_UNKNOWN.fullmatch(token)]
        token = named[0] if named else getattr(tokenizer, role) or getattr(tokenizer, other)
        if token is None:
            raise UserError(f"the tokenizer in {folder} has neither {role} nor {other}; choose another model")
        tokenizer.add_tokens(token, special_tokens=True)
        setattr(tokenizer, role, token)
    return tokenizer


def open_tokenizer(folder: Path, config):
    """Return the tokenizer of any model's folder. Its vocabulary decides which kind, since the class that the folder
    names is often missing or wrong. Raises UserError if it is missing, broken or doesn't fit the model's config."""
    names = {path.name for path in folder.iterdir()}
    if not has_vocabulary(names):
        raise UserError(f"no tokenizer in {folder}; it needs vocab.txt, tokenizer.json, or vocab.json and merges.txt")
    with loading(f"the tokenizer in {folder}"):
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        named = settings.get("tokenizer_class") or getattr(config, "tokenizer_class", None) or ""
        if "auto_map" in settings:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # rejects custom classes
        elif "tokenizer.json" in names and is_wordpiece(Tokenizer.from_file(str(folder / "tokenizer.json"))):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            if named.startswith("Bert") and "model_input_names" not in settings:
                tokenizer.model_input_names = BertTokenizer.model_input_names
        elif "vocab.txt" in names and not names & {"tokenizer.json", "vocab.json"} and not named.startswith(OWN_WORDS):
            with (folder / "vocab.txt").open(encoding="utf-8-sig") as lines:
                vocab = {line.rstrip(): i for i, line in enumerate(lines)}
            tokenizer = BertTokenizer.from_pretrained(folder, vocab=vocab)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    remove_unused_tokens(tokenizer, folder, config.get_text_config().vocab_size)
    for role in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        if (token := f"[{role[:-6].upper()}]") in tokenizer.get_vocab():  # BERT's names
            tokenizer.add_tokens(token, special_tokens=True)
            setattr(tokenizer, role, getattr(tokenizer, role) or token)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer in {folder} has neither pad_token nor eos_token; choose another model")
    return tokenizer


def remove_unused_tokens(tokenizer, folder: Path, vocab_size: int) -> None:
    """Remove tokens that were added to a tokenizer but never to its model. Raises UserError if the two don't fit."""
    vocab, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    beyond = {token for token, i in vocab.items() if i >= vocab_size}
    words = {token for token in beyond.difference(added) if not re.fullmatch(r"\s*|\[unused\d+\]", token)}
    n = max(vocab.values()) + 1
    if words or vocab_size > 1.1 * n + 128:  # padded to a round number
        sizes = f"{n} tokens, but the model has {vocab_size}; they don't belong together"
        advice = "download both again, or, if you added words, call resize_token_embeddings and save both"
        raise UserError(f"the tokenizer in {folder} has {sizes}: {advice}")
    if beyond.intersection(added):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # the library has no method that removes tokens
        tokenizer.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if token not in beyond]
        for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
            if getattr(tokenizer, role) in beyond:
                setattr(tokenizer, role, None)


def encode_prompt(tokenizer, prompt: str) -> torch.Tensor:
    """Return [CLS] and the prompt's tokens, 1-d int64, without a [SEP], which would end the text.

    Raises UserError if the prompt contains a special token or a word that the vocabulary doesn't know ([UNK]).
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if special := special_ids(tokenizer).intersection(ids):
        spans = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        start, end = next(span for token, span in zip(ids, spans) if token in special)
        problem = f"{prompt[start:end]!r} in the prompt {prompt!r} isn't in the vocabulary, or is a special token"
        raise UserError(f"{problem}; use other words, or lower-case letters")
    return torch.tensor([tokenizer.cls_token_id] + ids)


def decode(tokenizer, sequences: list[torch.Tensor]) -> list[str]:
    """Return token ids as text; half a character at the end of a byte-level text is left out."""
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True) if sequences else []
    return [clean_text(text) if is_bert(tokenizer) else text.rstrip("\ufffd") for text in texts]


def is_bert(tokenizer) -> bool:
    """Return whether decoded tokens are separated by spaces, which `clean_text` removes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and (is_wordpiece(backend) or backend.decoder is None)


def is_wordpiece(backend: Tokenizer) -> bool:
    return isinstance(backend.model, WordPiece)


def clean_text(text: str) -> str:
    """Join BERT's decoded tokens: remove special tokens, spaces except between Latin words, and a leading ##."""
    text = SPACE_BETWEEN_CHARACTERS.sub("", re.sub(r"\s+", " ", SPECIAL_TOKENS.sub(" ", text)))
    return text.removeprefix("##")


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer that encodes and decodes in plain `transformers` as `encode_prompt` and `decode` do here."""
    saved = copy.deepcopy(tokenizer)
    saved.bos_token, saved.eos_token = saved.cls_token, saved.sep_token  # the names that CTranslate2 and TRL know
    backend = saved.backend_tokenizer
    start = (saved.cls_token, saved.cls_token_id)
    # BERT's own would append [SEP], GPT-2's own would leave out the start token
    backend.post_processor = TemplateProcessing(single=[start[0], "$A"], special_tokens=[start])
    if is_bert(tokenizer):
        superfluous = f"{SPACE_BETWEEN_CHARACTERS.pattern}|^##"
        joined = [decoders.WordPiece(cleanup=False), decoders.Fuse(), decoders.Replace(Regex(superfluous), "")]
        backend.decoder = decoders.Sequence(joined)
    saved.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    settings["padding_side"] = "left"  # the prompts of a batch must end at the same position
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_gpt2_config(folder: Path) -> GPT2Config:
    """Return the GPT-2 config of a model folder. Raises UserError if the model has another architecture."""
    config = read_model_config(folder)
    if config.model_type != "gpt2":
        raise UserError(f"--model_name needs a GPT-2 model, but {folder} contains one of type '{config.model_type}'")
    # Chinese checkpoints name no special tokens; the library fills in 50256, which is outside their vocabulary
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    config.use_cache = True
    if config.activation_function == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function, fused
    return config


def read_policy_folder(folder: Path):
    """Return the GPT-2 config and the tokenizer of a model folder. Raises UserError if they don't fit each other."""
    gpt2_config, tokenizer = load_gpt2_config(folder), load_tokenizer(folder)
    start, end = tokenizer.cls_token, tokenizer.sep_token
    if (start, end) != ("[CLS]", "[SEP]"):
        print(f"{folder.name}: texts start with {start} and end with {end}")
    return gpt2_config, tokenizer


def load_policy(folder: Path, config: GPT2Config, device="cpu") -> GPT2HeadWithValueModel:
    """Return the policy in float32, from a plain GPT-2 checkpoint (the value head starts at zero) or one saved here.
    Raises UserError if weights are missing or don't fit the config."""
    model = load_weights(GPT2HeadWithValueModel, folder, config, device)
    if (folder / VALUE_HEAD).exists():
        with loading(folder / VALUE_HEAD):
            model.v_head.load_state_dict(load_file(folder / VALUE_HEAD))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight  # early 5.x versions untie them if the checkpoint has both
    if torch.device(device).type == "cpu":  # faster than SDPA on a CPU at these lengths, see docs/speed.md
        model.set_attn_implementation("eager")
    return model.to(device).eval()


def save_policy(
    model: GPT2HeadWithValueModel, tokenizer, folder: Path, temperature: float, gen_len: int, values=(0.0, 1.0)
) -> None:
    """Save a model so that plain `transformers` opens it as a GPT-2, and this program with its value head. The saved
    head predicts mean + unit * value, in the scores' unit, with values = (mean, unit). The model isn't changed."""
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(copy.deepcopy(model.config))
    weights = {
        name: weight.contiguous() for name, weight in model.state_dict().items() if not name.startswith("v_head.")
    }
    gpt2.load_state_dict(weights, assign=True)
    # Pipelines of 4.57 and early 5.x prefer their own 256 tokens and temperature 0.7 to those of generation_config.json
    gpt2.config.task_specific_params = {"text-generation": {"max_new_tokens": gen_len, "temperature": temperature}}
    with quiet_transformers():
        gpt2.save_pretrained(folder)
    head, (mean, unit) = model.v_head.state_dict(), values
    head = {"summary.weight": unit * head["summary.weight"], "summary.bias": unit * head["summary.bias"] + mean}
    save_file(head, folder / VALUE_HEAD)
    save_tokenizer(tokenizer, folder)
    GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=gen_len,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=never_sampled_ids(tokenizer, model.config.vocab_size),
    ).save_pretrained(folder)  # fmt: skip
    share_weights(folder)


def share_weights(folder: Path) -> None:
    """Make the weights in a folder readable for whoever can read its config; safetensors only lets their owner."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def read_model_config(folder: Path):
    """Return a folder's config.json as a config object. Raises UserError if it can't be read, see `check_folder`."""
    check_folder(folder)
    with loading(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vars(config).pop("auto_map", None)  # names code in the folder or on the Hub, such as an attention kernel
    config._attn_implementation = None
    return config


def load_weights(model_class, folder: Path, config, device) -> nn.Module:
    """Load a model in float32 on the CPU, for `device`. Raises UserError if weights, except for the value head's, are
    missing, can't be read, or have other shapes than `config` describes."""
    with loading(f"the weights in {folder}", second_weights(folder)):
        model, info = model_class.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("v_head.")):
        raise UserError(f"{folder} isn't a trained model: it lacks {missing[0]}; download it again, or choose another")
    for weight in model.parameters():
        weight.data = weight.data.clone()  # a memory-mapped file would stay in memory next to the weights
    if torch.device(device).type == "mps":  # SDPA has been wrong there, see pytorch 181133, 184180, 195910
        model.set_attn_implementation("eager")
    return model


@contextlib.contextmanager
def loading(what, hint: str = ""):
    """Turn an error of a library into a UserError that says what couldn't be loaded, unless memory ran out. `hint`
    follows the message."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shapes = "mismatched_sizes" in str(error)  # the library's message explains how to ignore this
        reason = "their shapes don't match config.json" if shapes else first_line(error)
        raise UserError(f"{what} can't be loaded ({reason}); download it again, or choose another model{hint}")


@contextlib.contextmanager
def quiet_transformers():
    """Silence the library's warnings and progress bars; this program reports what matters."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def hash_of(content) -> str:
    """Return 12 digits of a SHA-256 of repr(content), or of a state dict's names, shapes, dtypes and CRC-32s."""
    if not isinstance(content, dict):
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for name, tensor in content.items():
        numbers = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {numbers}\n".encode())
    return digest.hexdigest()[:12]
