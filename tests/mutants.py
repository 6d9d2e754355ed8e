"""Plant one bug after the other and see whether the tests notice.

    python -m tests.mutants [--only WORD]

Works in a copy of the tree. Prints a line for each bug; exit code 1 if one was not noticed, or if the code it changes
is no longer there.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

TESTS = [
    "tests/test_ppo_math.py",
    "tests/test_step_reference.py",
    "tests/test_checkpoint.py",
    "tests/test_trainer.py",
    "tests/test_sampling.py",
    "tests/test_python_api.py",
    "tests/test_loading.py",
    "tests/test_evaluation.py",
]
PPO, MODEL, SAVED, JUDGE = "ppo.py", "gpt2_value_head.py", "support/checkpoint.py", "support/evaluation.py"
MUTANTS = [  # (file, what stands there, the bug)
    (PPO, "whitened = whiten(advantages, mask)", "whitened = advantages"),
    (PPO, "whitened = whiten(advantages, mask)", "whitened = whiten(advantages, mask, shift_mean=False)"),
    (PPO, "np.random.default_rng([config.seed, self.n_steps, epoch]).permutation(n)", "np.arange(n)"),
    (PPO, "default_rng([config.seed, self.n_steps, epoch])", "default_rng([config.seed, self.n_steps])"),
    (PPO, "default_rng([config.seed, self.n_steps, epoch])", "default_rng([config.seed, epoch])"),
    (PPO, "loss = pg_loss + config.vf_coef * vf_loss", "loss = pg_loss + 0.1 * vf_loss"),
    (PPO, "score_completions(batch, self.config.detach_value)", "score_completions(batch, False)"),
    (PPO, "score_completions(batch, self.config.detach_value)", "score_completions(batch, True)"),
    (
        PPO,
        "restrict_logits(logits, self.restriction, self.config.temperature)",
        "restrict_logits(logits, self.restriction, 1.0)",
    ),
    (PPO, "(~grad_norm.isfinite()).float()", "grad_norm.isnan().float()"),
    (PPO, "(~grad_norm.isfinite()).float()", "(grad_norm * 0).nan_to_num(0.0)"),
    (PPO, "self.optimizer.found_inf = skipped", "pass"),
    (PPO, "self.skipped_in_a_row + 1 if one else 0", "self.skipped_in_a_row + int(one)"),
    (PPO, "eps=config.adam_epsilon, ", ""),
    (PPO, "-0.2), 0.2)", "-0.3), 0.3)"),
    (PPO, "n_steps / self.horizon", "1 / self.horizon"),
    (PPO, 'self.kl_controller.update(result["objective/kl"], n)', "pass"),
    (PPO, "(-kl_coef * (logprobs - ref_logprobs))", "(-kl_coef * (ref_logprobs - logprobs))"),
    (PPO, "last = mask.long().sum(-1) - 1", "last = mask.long().sum(-1) - 2"),
    (PPO, "rewards[rows, last] += scores", "rewards[rows, -1] += scores"),
    (PPO, "rewards[:, t] + gamma * next_value - values[:, t]", "rewards[:, t] + next_value - values[:, t]"),
    (PPO, "delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
    (PPO, "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    (PPO, "return advantages, advantages + values", "return advantages, advantages + rewards"),
    (PPO, "values = values.where(mask.bool(), 0)", "pass"),
    (PPO, "ratio.clamp(1 - cliprange, 1 + cliprange)", "ratio.clamp(1 - cliprange, 1)"),
    (
        PPO,
        "masked_mean(torch.maximum(unclipped, clipped), mask), clipfrac\n\n\ndef value_loss",
        "masked_mean(torch.minimum(unclipped, clipped), mask), clipfrac\n\n\ndef value_loss",
    ),
    (
        PPO,
        "return 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)",
        "return 0.5 * masked_mean(unclipped, mask)",
    ),
    (PPO, "return 0.5 * masked_mean(", "return masked_mean("),
    (PPO, "values.clamp(old_values - cliprange_value", "values.clamp(returns - cliprange_value"),
    (PPO, "clip_grad_norm_(self.trained, config.max_grad_norm)", "clip_grad_norm_(self.trained, 1e9)"),
    (PPO, '"lr": config.value_lr}', '"lr": config.lr}'),
    (PPO, "share = (power + 1) / (power + step)", "share = 1 / step"),
    (PPO, "share = (power + 1) / (power + step)", "share = (power + 1) / (power + step + 1)"),
    (PPO, "torch._foreach_lerp_(averages, weights, share)", "pass"),
    (PPO, "return self.average if self.n_steps else self.model", "return self.model"),
    (PPO, "old_logprobs[part], advantages[part]", "logprobs.detach(), advantages[part]"),
    (PPO, "mask.sum() / n_tokens", "len(micro_batch) / len(minibatch)"),
    (PPO, "ref_logprobs, *_ = self.score(self.ref_model, batch)", "ref_logprobs, *_ = self.score(self.model, batch)"),
    (PPO, "either.freeze(config.frozen_share)", "either.freeze(0)"),
    (PPO, "torch._foreach_copy_(self.computing, self.trained)", "pass"),
    (PPO, "for epoch in range(config.ppo_epochs):", "for epoch in range(1):"),
    (PPO, ".split(config.minibatch_size):", ".split(n):"),
    (PPO, "self.n_steps, self.n_drawn = self.n_steps + 1, 0", "self.n_steps += 1"),
    (PPO, "step = self.n_steps + 1 if step is None else step", "step = 1 if step is None else step"),
    (PPO, "first, self.n_drawn = self.n_drawn, self.n_drawn + len(query_tensors)", "pass"),
    (PPO, "kl.where(mask, 0).sum(-1), ref_logprobs, mask", "kl.sum(-1), ref_logprobs, mask"),
    (PPO, "return (logprobs.exp() * difference).sum(-1)", "return (ref_logprobs.exp() * difference).sum(-1)"),
    (PPO, "0.5 * masked_mean(log_ratio**2, mask)", "masked_mean(log_ratio**2, mask)"),
    (PPO, "ratio, pg_clipfrac, vf_clipfrac)", "ratio, vf_clipfrac, vf_clipfrac)"),
    (PPO, "ratio, pg_clipfrac, vf_clipfrac)", "ratio, pg_clipfrac, pg_clipfrac)"),
    (PPO, "(pg_loss, vf_loss, loss, ", "(pg_loss, vf_loss, pg_loss, "),
    (PPO, "rewards.sum(-1).mean(),\n            **", "rewards.mean(),\n            **"),
    (PPO, "non_score_rewards.sum(-1).mean()", "non_score_rewards.mean()"),
    (PPO, "masked_mean(returns, mask),", "returns.mean(),"),
    (PPO, "masked_mean(old_values, mask),", "old_values.mean(),"),
    (PPO, "((batch.ids == self.sep_token_id) & mask).any(-1)", "(batch.ids == self.sep_token_id)"),
    (MODEL, "nn.init.zeros_(module.weight)", "nn.init.normal_(module.weight)"),
    (MODEL, "hidden_states.detach() if detach_value else hidden_states", "hidden_states"),
    (MODEL, "round(share * len(self.transformer.h))", "round((1 - share) * len(self.transformer.h))"),
    (MODEL, "embeddings = (self.transformer.wte, self.transformer.wpe, self.lm_head)", "embeddings = ()"),
    (MODEL, "prompt_positions[prompts.rows, -1:] + after", "prompts.ids.shape[1] - 1 + after"),
    (MODEL, "(mask.long().cumsum(-1) - 1).clamp(min=0)", "torch.arange(mask.shape[1]).expand(mask.shape)"),
    (MODEL, "bias = bias.masked_fill(padding[:, None, None], lowest)", "pass"),
    (MODEL, "*range(len(tokenizer), vocab_size)", ""),
    (MODEL, "if len(used) == len(self.ids):", "if True:"),
    (MODEL, "triu(n_keys - seq + 1)", "triu(n_keys + 1)"),
    (MODEL, "cache.reorder_cache(prompts.rows)", "cache.reorder_cache(prompts.rows.flip(0))"),
    (
        MODEL,
        "{*tokenizer.all_special_ids, *range(",
        "{tokenizer.pad_token_id, tokenizer.unk_token_id, *range(",
    ),
    (MODEL, "alpha=1 / temperature", "alpha=temperature"),
    (MODEL, "key=[seed, step], counter=[0, 0, 0, index]", "key=[seed, 0], counter=[0, 0, 0, index]"),
    (MODEL, "key=[seed, step], counter=[0, 0, 0, index]", "key=[seed, step], counter=[0, 0, 0, 0]"),
    (MODEL, "running = running & (tokens != sep_token_id)", "running = tokens != sep_token_id"),
    (MODEL, "tokens.squeeze(1).where(running, pad_token_id)", "tokens.squeeze(1)"),
    (MODEL, "if t + 1 == gen_len or (t %", "if t + 2 == gen_len or (t %"),
    (
        MODEL,
        "cumulative = probs.to(precise).cumsum(-1)",
        "cumulative = probs.sort(descending=True).values.to(precise).cumsum(-1)",
    ),
    (MODEL, "(ended == 0) | ((ended == 1) & (responses == sep_token_id))", "ended == 0"),
    (MODEL, "(ended == 0) | ((ended == 1) & (responses == sep_token_id))", "ended <= 1"),
    (
        SAVED,
        'trainer.n_steps, trainer.kl_controller.value = state["step"], state["kl_coef"]',
        'trainer.n_steps = state["step"]',
    ),
    (SAVED, 'set_random_state(saved["random"])', "pass"),
    (SAVED, "random.setstate((version, tuple(numbers), gauss))", "pass"),
    (SAVED, 'torch.set_rng_state(state["torch"].cpu())', "pass"),
    (SAVED, "np.random.set_state((name", "str((name"),
    (SAVED, 'trainer.optimizer.load_state_dict(saved["optimizer"])', "pass"),
    (SAVED, "(trainer.average, average)", "(trainer.average, policy)"),
    (SAVED, 'trainer.skipped_in_a_row = state["skipped_in_a_row"]', "pass"),
    (SAVED, "for old in checkpoints(folder)[:-keep]:", "for old in checkpoints(folder)[:-99]:"),
    (SAVED, 'if sha256(path / name) != state["sha256"][name]:', "if False:"),
    (
        JUDGE,
        "weights = [(group / beta).softmax(0) for group in groups]",
        "weights = [group.softmax(0) for group in groups]",
    ),
    (JUDGE, "best.append((ways * ordered).sum())", "best.append(ordered[-1])"),
    (JUDGE, "math.log(n) - (n - 1) / n", "math.log(n)"),
]


def passes(tree: Path) -> bool:
    """Whether the tests pass on a tree; one that hangs does not."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    try:
        return subprocess.run(command, cwd=tree, capture_output=True, timeout=300).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only bugs whose text has this word")
    only = parser.parse_args().only
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__"))
        if not passes(tree):
            sys.exit("the tests fail without any bug")
        chosen = [mutant for mutant in MUTANTS if only in mutant[1] + mutant[2]]
        for file, right, wrong in chosen:
            source = (ROOT / file).read_text(encoding="utf-8")
            if source.count(right) != 1:
                survived += 1
                print(f"GONE      {file}: {right!r} stands there {source.count(right)} times", flush=True)
                continue
            (tree / file).write_text(source.replace(right, wrong), encoding="utf-8")
            noticed = not passes(tree)
            (tree / file).write_text(source, encoding="utf-8")
            survived += not noticed
            print(f"{'noticed ' if noticed else 'SURVIVED'}  {file}: {right!r} -> {wrong!r}", flush=True)
    print(f"{len(chosen)} bugs, {survived} not noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
