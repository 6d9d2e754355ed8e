"""Loading and saving models in the Hugging Face file layout, with what can be wrong with a folder said in one line."""

import contextlib
import copy
import json
import math
import re
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from gpt2_value_head import GPT2HeadWithValueModel
from support.batches import never_sampled_ids
from support.errors import UserError, first_line, is_out_of_memory
from support.hub import VALUE_HEAD, has_vocabulary, wanted_weights

SPECIAL_TOKENS = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK)\]")
SPACE_BETWEEN_CHARACTERS = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")


# ----------------------------------------------------------------------------------------------
# Texts and tokens


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder: BERT's, as Chinese GPT-2 has it, or a byte-level BPE, as other GPT-2 have.

    cls_token starts a text, sep_token ends it, and pad_token stands for nothing; where a BPE tokenizer lacks them, its
    own tokens for the same take their names. UserError where it is missing, broken or has none of these.
    """
    names = {path.name for path in folder.iterdir()}
    if not has_vocabulary(names):
        raise UserError(f"no tokenizer in {folder}: it needs vocab.txt, tokenizer.json, or vocab.json and merges.txt")
    try:
        kind = BertTokenizer if is_bare_chinese_gpt2(folder) else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a𪚥", truncation=True)  # a broken one may open, and fail at a character that it does not know
    except BaseException as error:  # a panic of the Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"the tokenizer in {folder} cannot be loaded ({first_line(error)})")
    for name, other in (("cls_token", "bos_token"), ("sep_token", "eos_token"), ("pad_token", "eos_token")):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, getattr(tokenizer, other))
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"the tokenizer in {folder} has neither {name} nor {other}; a text needs a start and an end"
            )
    return tokenizer


def is_bare_chinese_gpt2(folder: Path) -> bool:
    """Whether this is a GPT-2 with vocab.txt alone, of which nothing says that its tokenizer is BERT's."""
    configs = [folder / name for name in ("config.json", "tokenizer_config.json") if (folder / name).exists()]
    values = [json.loads(path.read_text(encoding="utf-8")) for path in configs]
    alone = not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists()
    return alone and values[0].get("model_type") == "gpt2" and not any(value.get("tokenizer_class") for value in values)


def encode_prompt(tokenizer, prompt: str) -> torch.Tensor:
    """[CLS] and the prompt's tokens, 1-d int64; no [SEP], which would end the text before it begins.

    UserError where one of them is a special token, be it [UNK] for a character: the model would see another prompt.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if special := set(tokenizer.all_special_ids).intersection(ids):
        found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        spans = found.get("offset_mapping", [(0, len(prompt))] * len(ids))
        start, end = next(span for token, span in zip(ids, spans) if token in special)
        if (part := prompt[start:end]) in tokenizer.all_special_tokens:
            raise UserError(f"the prompt {prompt!r} has {part} written out, which is no text here; leave it out")
        cured = tokenizer.unk_token_id not in tokenizer.encode(prompt.lower(), add_special_tokens=False)
        way_out = f"write {prompt.lower()!r}" if cured else "leave it out, or say it otherwise"
        raise UserError(f"the vocabulary does not know {part!r} in the prompt {prompt!r}; {way_out}")
    return torch.tensor([tokenizer.cls_token_id] + ids)


def decode(tokenizer, sequences: list[torch.Tensor]) -> list[str]:
    """Token ids as people write them. Half a character at the end of a byte-level text is left out."""
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True) if sequences else []
    return [clean_text(text) if is_bert(tokenizer) else text.rstrip("\ufffd") for text in texts]


def is_bert(tokenizer) -> bool:
    """Whether decoded tokens stand between spaces, which `clean_text` takes out."""
    return isinstance(tokenizer, BertTokenizer)


def clean_text(text: str) -> str:
    """BERT's decoded tokens as people write them: no special tokens, no spaces but those between Latin words, and no ##
    of a first token that continues a word."""
    text = SPACE_BETWEEN_CHARACTERS.sub("", re.sub(r"\s+", " ", SPECIAL_TOKENS.sub(" ", text)))
    return text.removeprefix("##")


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer. BERT's will, in plain `transformers`, encode a prompt as `encode_prompt` does and decode as
    `decode` does: its class there would append a [SEP], hand GPT-2 token types, and put spaces between characters."""
    if not is_bert(tokenizer):
        tokenizer.save_pretrained(folder)
        return
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    start = (tokenizer.cls_token, tokenizer.cls_token_id)
    backend.post_processor = TemplateProcessing(single=[start[0], "$A"], special_tokens=[start])
    superfluous = f"{SPACE_BETWEEN_CHARACTERS.pattern}|^##"
    joined = [decoders.WordPiece(cleanup=False), decoders.Fuse(), decoders.Replace(Regex(superfluous), "")]
    backend.decoder = decoders.Sequence(joined)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# Models


def load_gpt2_config(folder: Path) -> GPT2Config:
    """The GPT-2 config of a model folder, read before any weights. UserError for another architecture.

    Chinese GPT-2 checkpoints leave out the special-token ids, so the library fills in 50256, outside their
    vocabulary: they are dropped here. `gelu_new` becomes the fused implementation of the same function.
    """
    config = read_model_config(folder)
    if config.model_type != "gpt2":
        raise UserError(f"--model_name needs a GPT-2 model, and {folder} holds one of type '{config.model_type}'")
    if config.add_cross_attention:
        raise UserError(
            f"the GPT-2 in {folder} has cross-attention (add_cross_attention), which nothing here could feed"
        )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    config.use_cache = True
    if config.activation_function == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def read_policy_folder(folder: Path):
    """The GPT-2 config and the tokenizer of a model folder, which are small. UserError where they do not fit.

    Embeddings may have more rows than the tokenizer has tokens, to fill up a round number.
    """
    gpt2_config, tokenizer = load_gpt2_config(folder), load_tokenizer(folder)
    if not len(tokenizer) <= gpt2_config.vocab_size <= 1.1 * len(tokenizer) + 128:
        sizes = f"{len(tokenizer)} tokens, the model {gpt2_config.vocab_size}"
        raise UserError(f"the tokenizer in {folder} has {sizes}: they do not belong together")
    return gpt2_config, tokenizer


def load_policy(folder: Path, config: GPT2Config, device="cpu") -> GPT2HeadWithValueModel:
    """The policy in float32 from a plain GPT-2 checkpoint (a fresh value head at zero) or from a folder saved here."""
    model, missing = load_weights(GPT2HeadWithValueModel, folder, config, device)
    value_head = {"v_head.summary.weight", "v_head.summary.bias"}
    if (folder / VALUE_HEAD).exists():
        try:
            model.v_head.load_state_dict(load_file(folder / VALUE_HEAD))
        except Exception as error:
            raise UserError(f"{folder / VALUE_HEAD} is no value head of this model ({first_line(error)}); remove it")
    elif missing & value_head:
        print(f"{folder.name}: no value head in this checkpoint, starting one at zero")
    if broken := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UserError(f"the weights in {folder} hold NaN or infinity, first in {broken[0]}: the model is broken")
    if missing - value_head:
        raise UserError(f"the weights in {folder} lack {sorted(missing - value_head)[0]}: not a whole GPT-2 checkpoint")
    for weight in model.parameters():
        # A slice of a larger tensor was saved with all of it, and could not be saved again
        if weight.untyped_storage().nbytes() > weight.nbytes:
            weight.data = weight.data.clone()
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight  # early 5.x leaves them apart where a checkpoint holds both
    if torch.device(device).type == "cpu":  # faster there than SDPA's kernels at these lengths, see docs/speed.md
        model.set_attn_implementation("eager")
    return model.to(device).eval()


def save_policy(
    model: GPT2HeadWithValueModel, tokenizer, folder: Path, temperature: float, gen_len: int, value_unit: float = 1.0
) -> None:
    """Write a folder that plain `transformers` opens as a GPT-2, and that opens here with its value head, whose values
    are those of the model times `value_unit`."""
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(copy.deepcopy(model.config))
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("v_head.")}
    gpt2.load_state_dict(weights, assign=True)
    # Early 5.x pipelines prefer their own 256 tokens to those of generation_config.json
    gpt2.config.task_specific_params = {"text-generation": {"max_new_tokens": gen_len}}
    with quiet_transformers():
        gpt2.save_pretrained(folder)
    value_head = copy.deepcopy(model.v_head)
    value_head.scale_(value_unit)
    save_file(value_head.state_dict(), folder / VALUE_HEAD)
    save_tokenizer(tokenizer, folder)
    GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=gen_len,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=never_sampled_ids(tokenizer, model.config.vocab_size),
    ).save_pretrained(folder)


def read_model_config(folder: Path):
    """A folder's config.json as the library's config object. UserError where it cannot be read."""
    if not (folder / "config.json").is_file():
        raise UserError(f"no model in {folder}: it has no config.json")
    try:
        if (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_labels") or 0) > 10**6:
            raise ValueError("num_labels is over a million, for each of which the library makes a name")
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder / 'config.json'} is no readable model config ({first_line(error)})")
    vars(config).pop("auto_map", None)  # code in the folder or on the hub, as an attention's kernel is
    config._attn_implementation = None
    return config


def load_weights(model_class, folder: Path, config, device) -> tuple[nn.Module, set[str]]:
    """`from_pretrained` in float32 without its alarms: the model, for a device but not there yet, and the names of
    weights that the checkpoint lacks."""
    if not wanted_weights([path.name for path in folder.iterdir()]):
        raise UserError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin is there")
    try:
        with quiet_transformers():
            check_sizes(model_class, folder, config)
            model, info = model_class.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        hint = "is the file whole, and nothing but weights?"
        raise UserError(f"the weights in {folder} cannot be loaded ({first_line(error)}); {hint}")
    if torch.device(device).type == "mps":  # SDPA has been wrong there, see pytorch 181133, 184180, 195910
        model.set_attn_implementation("eager")
    return model, set(info["missing_keys"])


def check_sizes(model_class, folder: Path, config) -> None:
    """UserError where a config makes another model than the weights are, before it takes time and memory to build."""
    shapes = weight_shapes(folder)
    differ = f"{folder / 'config.json'} and the weights beside it do not belong together"
    if (layers := getattr(config, "num_hidden_layers", 0)) > len(shapes):
        raise UserError(f"{differ}: it has {layers} layers, they are {len(shapes)} tensors")
    with torch.device("meta"):
        model = getattr(model_class, "from_config", model_class)(config)
    for name, weight in model.state_dict().items():
        if (found := shapes.get(name, weight.shape)) != weight.shape:
            raise UserError(f"{differ}: it makes {name} {tuple(weight.shape)}, they hold {tuple(found)}")
    needed, found = model.num_parameters(), sum(map(math.prod, shapes.values()))
    if needed > 2 * found:  # a head may be missing, which is told later
        raise UserError(f"{differ}: it makes a model of {needed:,} numbers, they are {found:,}")


def weight_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shape of every weight in a folder, from the heads of the files."""
    shapes = {}
    for path in (folder / name for name in wanted_weights([path.name for path in folder.iterdir()])):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                shapes |= {name: torch.Size(weights.get_slice(name).get_shape()) for name in weights.keys()}
        elif path.suffix == ".bin":
            weights = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            shapes |= {name: weight.shape for name, weight in weights.items() if isinstance(weight, torch.Tensor)}
    return shapes


@contextlib.contextmanager
def quiet_transformers():
    """Silence the library's warnings and progress bars: what matters of them is said in our own words."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
