"""Helpers shared by several test files: small models and runs, a reference implementation of PPO, and doc pages."""

import copy
import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from config import PPOConfig
from plot_rewards import PANELS
from ppo import PPOTrainer
from reward import Rewards
from support.models.demo_models import NEGATIVE, POSITIVE
from support.models.pretrained import encode_prompt
from support.run.evaluation import Evaluation, Results
from support.run.run_folder import RunFolder
from support.run.text_trainer import TextPPOTrainer
from train_ppo import main, train

ROOT = Path(__file__).resolve().parent.parent
SEP, FORBIDDEN = 3, [0, 1, 2, 4]
MEAN, STD = "env/reward_mean", "env/reward_std"
COLUMNS = [column for _, columns, _ in PANELS for column in columns]

CHARACTERS = "刚收到货,感觉很不错好评差质量快递物流一般满意失望衣服苹果这本书电影!。"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, "good", "##s"]


def write_model(folder: Path, config: dict, weights: dict, vocab=VOCAB) -> Path:
    """Write a model folder in the published layout: pytorch_model.bin, vocab.txt, and no special-token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    tokenizer = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    tokenizer |= {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 48}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def write_gpt2(folder: Path, **changes) -> Path:
    """Write a random GPT-2 with two layers of width 32 and the old attn.bias buffers of published checkpoints."""
    torch.manual_seed(0)
    config = dict(
        architectures=["GPT2LMHeadModel"], tokenizer_class="BertTokenizer", activation_function="gelu_new",
        resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1, initializer_range=0.2,
        n_embd=32, n_layer=2, n_head=2, n_positions=48, vocab_size=len(VOCAB),
    ) | changes  # fmt: skip
    weights = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=None, eos_token_id=None)).state_dict()
    for i in range(config["n_layer"]):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    return write_model(folder, {"model_type": "gpt2"} | config, weights)


def write_classifier(folder: Path, labels=(NEGATIVE, POSITIVE)) -> Path:
    """Write a random BERT classifier with one layer of width 16."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48, initializer_range=0.5, id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)}, architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    weights = BertForSequenceClassification(config).state_dict()
    return write_model(folder, config.to_dict() | {"tokenizer_class": "BertTokenizer"}, weights)


TRACKER = """
import json
import sys
from pathlib import Path


def note(*call):
    with Path(__file__).with_suffix(".calls").open("a", encoding="utf-8") as file:
        file.write(json.dumps(call, default=lambda value: getattr(value, "__dict__", str(value))) + "\\n")


class Table:
    def __init__(self, columns=None, data=None):
        self.columns, self.data = columns, data

    add = __init__


class echarts:
    Table = Table


def init(**options):
    note("init", options)
    return sys.modules[__name__]


def log(data, step=None):
    note("log", data, step)


def finish(**how):
    note("finish", how)
"""


def read(page: str) -> str:
    """Read a page, given its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(page: str, language: str = r"\w+") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


SMALL = "--preset demo --device cpu --episodes 48 --batch_size 16 --minibatch_size 8 --eval_samples 16".split()


def small_run(tmp_path, *flags, name="run"):
    code = main([*SMALL, "--runs_dir", str(tmp_path), *(("--run_name", name) if name else ()), *flags])
    return code, tmp_path / str(name)


def count_characters(texts):
    return [0.1 * len(set(text)) for text in texts]


def as_rewards(reward) -> Rewards:
    return reward if isinstance(reward, Rewards) else Rewards({"reward": reward})


def tiny_run(run_dir, policy, reward=count_characters, resume=False, inputs=None, **changes) -> int:
    """Run three steps on a random model, in about 0.25 seconds. Returns the exit code, and doesn't catch exceptions."""
    defaults = dict(
        episodes=24, batch_size=8, minibatch_size=8, ppo_epochs=1, gen_len=4, eval_samples=8, device="cpu",
        dtype="float32", save_every=1, log_samples_every=0, runs_dir=str(run_dir.parent), run_name=run_dir.name,
    )  # fmt: skip
    config, argv = PPOConfig(**defaults | changes), ["--resume"] if resume else []
    trainer = PPOTrainer(config, copy.deepcopy(policy[0]), copy.deepcopy(policy[0]), policy[1])
    with (RunFolder.resume if resume else RunFolder.create)(run_dir, trainer, inputs or {}, argv) as folder:
        queries = [encode_prompt(policy[1], prompt) for prompt in PROMPTS[1:]]
        return train(trainer, as_rewards(reward), PROMPTS[1:], queries, folder)


def contents(folder) -> dict:
    """Return the bytes of every file in a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path, **changes) -> None:
    path.write_text(json.dumps(read_json(path) | changes, ensure_ascii=False), encoding="utf-8")


def copy_run(run_dir: Path, folder: Path, **settings) -> Path:
    """Copy a run, and change `settings` in the copy's config.json."""
    shutil.copytree(run_dir, folder)
    change_json(folder / "config.json", **settings)
    return folder


def rows(run_dir):
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def weights(run_dir):
    return (run_dir / "model" / "model.safetensors").read_bytes()


PROMPTS = ["刚收到货,感觉", "衣服", "这本书很好"]


def make(policy, **changes):
    model, tokenizer = policy
    defaults = dict(batch_size=6, minibatch_size=6, gen_len=6, dtype="float32", device="cpu", episodes=60)
    return TextPPOTrainer(PPOConfig(**{**defaults, **changes}), model, copy.deepcopy(model), tokenizer)


def batch_of(trainer, policy, n=6):
    queries = [encode_prompt(policy[1], PROMPTS[i % 3]) for i in range(n)]
    responses = trainer.generate(queries)
    return queries, responses, [0.1 * i for i in range(n)]


class Reference:
    """A second implementation of PPO, written from the documentation of PPOConfig and ppo.py."""

    def __init__(self, config, model, ref_model):
        self.config, self.n_steps, self.kl_coef, self.unit = config, 0, config.init_kl_coef, None
        self.gpt2, self.ref_gpt2 = plain_gpt2(model), plain_gpt2(ref_model)
        self.weight = model.v_head.summary.weight.detach().double()[0].requires_grad_()
        self.bias = model.v_head.summary.bias.detach().double().requires_grad_()
        n_frozen = round(config.frozen_share * model.config.n_layer)
        frozen = ("transformer.wte", "transformer.wpe", *(f"transformer.h.{i}." for i in range(n_frozen)))
        for name, parameter in self.gpt2.named_parameters():
            parameter.requires_grad_(not (n_frozen and name.startswith(frozen)))
        policy = [parameter for parameter in self.gpt2.parameters() if parameter.requires_grad]
        self.trained = [*policy, self.weight, self.bias]
        groups = [{"params": policy, "lr": config.lr}, {"params": self.trained[-2:], "lr": config.value_lr}]
        self.optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon)
        self.history = []

    def logprobs_and_values(self, gpt2, query, response):
        """Return the log-probabilities, values and entropies of one completion, T numbers each."""
        output = gpt2(torch.cat([query, response])[None], output_hidden_states=True)
        logits = output.logits[0, len(query) - 1 : -1] / self.config.temperature
        forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(FORBIDDEN), True)
        logprobs = logits.masked_fill(forbidden, -1e300).log_softmax(-1)
        hidden_states = output.hidden_states[-1][0, len(query) - 1 : -1]
        if self.config.detach_value:
            hidden_states = hidden_states.detach()
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs[torch.arange(len(response)), response], hidden_states @ self.weight + self.bias, entropy

    def step(self, queries, responses, scores):
        c, n = self.config, len(queries)
        mean = np.mean(scores)
        if self.unit is None:
            self.start = mean if self.weight.any() or self.bias.any() else 0.0  # a new head predicts the mean anyway
            self.unit = np.std(scores) / 0.4
            with torch.no_grad():
                self.weight /= self.unit
                self.bias.sub_(self.start).div_(self.unit)
        with torch.no_grad():
            old = [self.logprobs_and_values(self.gpt2, *pair) for pair in zip(queries, responses)]
            ref = [self.logprobs_and_values(self.ref_gpt2, *pair)[0] for pair in zip(queries, responses)]
        kls = [logprobs - ref_logprobs for (logprobs, _, _), ref_logprobs in zip(old, ref)]
        rewards = [-self.kl_coef / self.unit * kl for kl in kls]
        advantages, returns = [], []
        for reward, score, (_, values, _) in zip(rewards, scores, old):
            reward[-1] += (score - mean) / self.unit
            advantage = torch.zeros_like(values)
            for t in range(len(values)):
                for k in range(t, len(values)):
                    following = values[k + 1] if k + 1 < len(values) else 0
                    advantage[t] += (c.gamma * c.lam) ** (k - t) * (reward[k] + c.gamma * following - values[k])
            advantages.append(advantage)
            returns.append(advantage + values)
        together = torch.cat(advantages).numpy()
        advantages = [(a - together.mean()) / np.sqrt(together.var() + 1e-8) for a in advantages]

        updates = []
        for epoch in range(c.ppo_epochs):
            order = np.random.default_rng([c.seed, self.n_steps, epoch]).permutation(n)
            for start in range(0, n, c.minibatch_size):
                policy_losses, value_losses, squares, ratios, policy_clips, value_clips = [], [], [], [], [], []
                for i in order[start : start + c.minibatch_size]:
                    logprobs, values, _ = self.logprobs_and_values(self.gpt2, queries[i], responses[i])
                    for t in range(len(values)):
                        ratio = torch.exp(logprobs[t] - old[i][0][t])
                        plain = -advantages[i][t] * ratio
                        clipped = -advantages[i][t] * min(max(ratio, 1 - c.cliprange), 1 + c.cliprange)
                        policy_losses.append(max(plain, clipped))
                        policy_clips.append(float(clipped > plain))
                        before, clip = old[i][1][t], c.cliprange_value
                        clipped = min(max(values[t], before - clip), before + clip)
                        errors = [(v - returns[i][t]) ** 2 for v in (values[t], clipped)]
                        value_losses.append(max(errors) / 2)
                        value_clips.append(float(errors[1] > errors[0]))
                        squares.append((logprobs[t] - old[i][0][t]).item() ** 2)
                        ratios.append(ratio.item())
                policy_loss, value_loss = sum(policy_losses) / len(ratios), sum(value_losses) / len(ratios)
                self.optimizer.zero_grad(set_to_none=False)  # the gradient is 0, not None, if all values are clipped
                loss = policy_loss + c.vf_coef * value_loss
                loss.backward()
                norm = sum((p.grad**2).sum() for p in self.trained).sqrt().item()
                for p in self.trained:
                    p.grad *= min(1.0, c.max_grad_norm / norm)
                self.optimizer.step()
                means = (0.5 * np.mean(squares), np.mean(ratios), np.mean(policy_clips), np.mean(value_clips))
                updates.append([policy_loss.item(), value_loss.item(), loss.item(), *means, norm])
        names = ("loss/policy", "loss/value", "loss/total", "policy/approxkl", "policy/ratio", "policy/clipfrac")
        names = [f"ppo/{name}" for name in (*names, "val/clipfrac", "grad_norm")]
        kl = sum(kl.sum().item() for kl in kls) / n
        targets, predictions = torch.cat(returns), torch.cat([values for _, values, _ in old])
        stats = dict(zip(names, np.mean(updates, axis=0).tolist())) | {
            "objective/kl": kl,
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": torch.cat([entropy for _, _, entropy in old]).mean().item(),
            "objective/non_score_reward": -self.kl_coef * kl,
            "objective/rlhf_reward": np.mean(scores) - self.kl_coef * kl,
            "ppo/skipped": 0.0,
            "ppo/returns/mean": mean + self.unit * targets.mean().item(),
            "ppo/val/mean": mean + self.unit * predictions.mean().item(),
            "ppo/val/explained_variance": 1 - (targets - predictions).numpy().var() / targets.numpy().var(),
            "tokens/completion_length": np.mean([len(response) for response in responses]),
            "tokens/ended_share": np.mean([SEP in response for response in responses]),
        }
        if c.kl_controller == "adaptive":
            self.kl_coef *= 1 + min(max(kl / c.target - 1, -0.2), 0.2) * n / c.horizon
        self.n_steps += 1
        self.history.append(self.weights())
        return stats

    def weights(self):
        named = {**self.gpt2.state_dict(), "v_head.summary.weight": self.weight[None], "v_head.summary.bias": self.bias}
        return {name: tensor.detach().clone() for name, tensor in named.items()}

    def average(self):
        """Average the weights after the first and after the second step, like `polynomial_average`."""
        share = (self.config.average_power + 1) / (self.config.average_power + 2)
        first, second = self.history
        return {name: (1 - share) * first[name] + share * second[name] for name in first}


def plain_gpt2(model):
    gpt2 = GPT2LMHeadModel(model.config)
    gpt2.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("v_head")})
    return gpt2.double().eval()


def write_bpe_gpt2(folder):
    """Write a random GPT-2 with a freshly trained byte-level BPE tokenizer, with the files of the English `gpt2`."""
    folder = write_gpt2(folder, vocab_size=300)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["刚收到货,感觉很不错", "this film was great, truly"] * 9, 299, 2, False, ["<|endoftext|>"])
    bpe.save_model(str(folder))
    (folder / "vocab.txt").unlink()
    size = bpe.get_vocab_size()
    change_json(folder / "config.json", vocab_size=size, tokenizer_class=None)
    weights = torch.load(folder / "pytorch_model.bin")
    weights |= {name: weights[name][:size] for name in ("transformer.wte.weight", "lm_head.weight")}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def write_run(folder, steps=30, seed=0, without=(), settings={}, **changes):
    """Write a run folder: config.json with `settings`, and all plotted columns, random unless given in `changes`."""
    rng = np.random.default_rng(seed)
    metrics = {"step": np.arange(1, steps + 1), "episodes": 128 * np.arange(1, steps + 1)}
    metrics |= {name: rng.uniform(0.2, 0.8, steps) for name in (MEAN, STD, *COLUMNS, "time/step")}
    metrics |= changes
    folder.mkdir(parents=True)
    names = [name for name in metrics if name not in without]
    table = zip(*(np.broadcast_to(metrics[name], steps).tolist() for name in names))
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *table])
    config = {"preset": "demo", "seed": 1, "init_kl_coef": 0.15, "lr": 1e-4, "run_name": folder.name}
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def evaluation(samples, kls=None, **figures) -> Evaluation:
    """Return an Evaluation of (prompt, completion, reward) samples. Figures that aren't given are 0."""
    kls = kls or [0.0] * len(samples)
    found = dict.fromkeys((field.name for field in dataclasses.fields(Evaluation)), 0.0)
    found |= {"n": len(samples), "unsteady": "", "reward": float(np.mean([reward for *_, reward in samples]))}
    found |= {
        "kl": float(np.mean(kls)),
        "commonest": [],
        "parts": [],
        "samples": [list(sample) for sample in samples],
        "kls": kls,
    }
    found["end_token"] = "[SEP]"
    return Evaluation(**found | figures)


def example_results(unit=1.0) -> Results:
    """Return the results of a run whose rewards have a standard deviation of 0.4 units before training."""
    figures = {"kl": 1.2346, "distinct_1": 0.1006, "distinct_2": 0.5006, "unique": 0.98765, "length": 12.34}
    figures |= {"ended": 0.1234, "ref_logprob": -2.345, "reward_ci95": 0.0114 * unit}
    before = [["p|", "old\n1", 0.1 * unit], ["p|", "old2", 0.9 * unit]]
    after = [["p|", "new1", 0.876 * unit], ["p|", "new2", 0.5 * unit]]
    limit = {"reward": 0.9317 * unit, "kl": 1.3579, "J": 0.7284 * unit}
    gain = {"beta": 0.15 * unit, "limit": limit, "J_before": 0.2546 * unit, "J": 0.6904 * unit}
    return Results(
        evaluation(before, **figures, reward=0.25449 * unit),
        evaluation(after, **figures, reward=0.87551 * unit),
        gain=gain | {"gain": 0.9177, "gain_se": 0.0234},
        verdict="good",
    )


def load_gpt2(folder):
    """Return a fresh policy and its tokenizer."""
    from support.models.pretrained import load_gpt2_config, load_policy, load_tokenizer

    return load_policy(folder, load_gpt2_config(folder)), load_tokenizer(folder)


def checkpoints(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def leave_pictures_empty(patch) -> None:
    """Make runs write an empty rewards.png, because drawing takes longer than a small run. patch: a MonkeyPatch."""
    patch.setattr("plot_rewards.draw", lambda runs, out: out.touch())


def draw_no_pixels(patch) -> list:
    """Make `savefig` write an empty file. Returns a list that collects the figures and their `savefig` options."""
    drawn = []

    def savefig(self, out, **options):
        out.touch()
        drawn.append((self, options))

    patch.setattr("matplotlib.figure.Figure.savefig", savefig)
    patch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda self, figure: None)
    return drawn
