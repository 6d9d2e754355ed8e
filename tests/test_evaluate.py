"""`evaluate` on a changed policy: every figure is recomputed with plain forward passes of the library's GPT-2."""

import copy
import math
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import PPOConfig
from support.models.pretrained import encode_prompt
from support.run.evaluation import evaluate
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import FORBIDDEN, SEP, VOCAB, as_rewards, load_gpt2, plain_gpt2

PROMPTS, N, GEN_LEN, TEMPERATURE = ["刚收到货,感觉", "衣服", "这本书很不错"], 61, 4, 0.7
SEED = 20_170_707  # every evaluation uses this seed, in earlier versions, too


def score(texts: list[str]) -> list[float]:
    """Return a different number between -1 and 2 for every text."""
    return [zlib.crc32(text.encode()) % 3000 / 1000 - 1 for text in texts]


def queries_of(tokenizer) -> list[torch.Tensor]:
    return [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]


class Evaluated:
    """The evaluation of a policy that ends many texts early, with everything that went into it."""

    def __init__(self, folder, **changes):
        self.reference, self.tokenizer = load_gpt2(folder)
        self.model = copy.deepcopy(self.reference)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            to_sep = self.model.lm_head.weight[SEP]
            self.model.transformer.ln_f.bias += 4 * to_sep / to_sep.norm() ** 2
        settings = dict(gen_len=GEN_LEN, temperature=TEMPERATURE, eval_samples=N, micro_batch_size=7, frozen_share=0.0)
        config = PPOConfig(**settings | {"device": "cpu", "dtype": "float32", "seed": 11} | changes)
        self.trainer = TextPPOTrainer(config, copy.deepcopy(self.model), copy.deepcopy(self.reference), self.tokenizer)
        self.result = evaluate(self.trainer, self.model, as_rewards(score), PROMPTS, queries_of(self.tokenizer))
        self.prompts, self.completions, self.scores = map(list, zip(*self.result.samples))


@torch.no_grad()
def logprobs_of_next(model, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, -1] / TEMPERATURE
    return logits.index_fill(0, torch.tensor(FORBIDDEN), -1e4).log_softmax(-1)


@pytest.fixture(scope="module")
def evaluated(gpt2_folder) -> Evaluated:
    return Evaluated(gpt2_folder)


@pytest.fixture(scope="module")
def recount(evaluated) -> SimpleNamespace:
    """The evaluation's samples, computed again token by token, with their KL and reference log-probabilities."""
    models = [plain_gpt2(model) for model in (evaluated.model, evaluated.reference)]
    found = SimpleNamespace(responses=[], kls=[], ref_logprobs=[])
    for i in range(N):
        ids = [2, *(VOCAB.index(character) for character in PROMPTS[i % 3])]
        philox = np.random.Philox(key=[SEED, 0], counter=[0, 0, 0, i])
        response, kl = [], 0.0
        for uniform in np.random.Generator(philox).random(GEN_LEN, np.float32):
            logprobs, ref_logprobs = (logprobs_of_next(model, ids + response) for model in models)
            token = int((logprobs.exp().cumsum(0) <= uniform).sum())
            kl += (logprobs.exp() * (logprobs - ref_logprobs)).sum().item()
            found.ref_logprobs.append(ref_logprobs[token].item())
            response.append(token)
            if token == SEP:
                break
        found.responses.append(response)
        found.kls.append(kl)
    return found


def test_completions_scores_and_lengths_match_sampling_token_by_token(evaluated, recount):
    assert evaluated.result.n == N == len(evaluated.completions)
    assert evaluated.prompts == (PROMPTS * 21)[:N]
    written = ["".join(VOCAB[token] for token in response if token != SEP) for response in recount.responses]
    assert [text.replace(" ", "") for text in evaluated.completions] == [text.replace("##", "") for text in written]
    expected = score([prompt + text for prompt, text in zip(evaluated.prompts, evaluated.completions)])
    assert evaluated.scores == pytest.approx(expected, abs=1e-6)
    assert evaluated.result.reward == pytest.approx(np.mean(expected), abs=1e-6)
    assert evaluated.result.reward_ci95 == pytest.approx(1.96 * np.std(expected, ddof=1) / math.sqrt(N), rel=1e-5)
    # In some completions, [SEP] is the last of gen_len tokens
    ended = [response[-1] == SEP for response in recount.responses]
    lengths = [len(response) for response in recount.responses]
    assert 0 < sum(ended) < N and sum(lengths) < N * GEN_LEN
    assert any(end and length == GEN_LEN for end, length in zip(ended, lengths))
    assert evaluated.result.ended == pytest.approx(sum(ended) / N)
    assert evaluated.result.length == pytest.approx(sum(lengths) / N)


def test_the_kl_is_summed_over_vocabulary_and_tokens(evaluated, recount):
    """float32 rounds a log-probability near 10 by about 1e-6, and a text has up to 4 tokens."""
    assert evaluated.result.kls == pytest.approx(recount.kls, abs=1e-4) and min(recount.kls) > 0.01
    assert evaluated.result.kl == pytest.approx(sum(recount.kls) / N, abs=1e-5)
    expected = sum(recount.ref_logprobs) / len(recount.ref_logprobs)
    assert evaluated.result.ref_logprob == pytest.approx(expected, abs=1e-5)


def test_equal_completions_of_different_prompts_count_as_different_texts(evaluated):
    counts = Counter(zip(evaluated.prompts, evaluated.completions))
    assert len(set(evaluated.completions)) < len(counts) < N
    assert evaluated.result.unique == pytest.approx(len(counts) / N)
    texts = {prompt + completion: count for (prompt, completion), count in counts.items()}
    commonest = evaluated.result.commonest
    assert [count for _, count in commonest] == sorted(counts.values(), reverse=True)[:10]
    assert all(texts.pop(text) == count for text, count in commonest)


def test_an_evaluation_does_not_depend_on_the_seed_or_the_step(evaluated, gpt2_folder):
    other = Evaluated(gpt2_folder, seed=12)
    queries = [encode_prompt(other.tokenizer, PROMPTS[0])] * 4
    other.trainer.step(queries, other.trainer.generate(queries), [0.0] * 4)
    assert (
        evaluated.result
        == other.result
        == evaluate(other.trainer, other.model, as_rewards(score), PROMPTS, queries_of(other.tokenizer))
    )


def test_bfloat16_rounds_both_the_policy_and_the_reference(gpt2_folder):
    """The reference has KL 0 to itself, although the evaluated copy is in float32."""
    evaluated = Evaluated(gpt2_folder, dtype="bfloat16")
    itself = evaluate(
        evaluated.trainer, evaluated.reference, as_rewards(score), PROMPTS, queries_of(evaluated.tokenizer)
    )
    assert itself.kls == pytest.approx([0.0] * N, abs=1e-6)
    assert evaluated.result.kl > 0.01
