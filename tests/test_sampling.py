"""The policy, sampling and shared prompts match plain forward passes of single sequences.

The models compute in float64 here. Two correct computations of a logit differ by at most 1e-12 (about 4,000 roundings
of 2^-53), and a wrong one differs by far more than 1e-9, on any processor.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import gpt2_value_head as g
from gpt2_value_head import SharedPrompts
from support.compute import batches as b
from support.compute import vocabulary
from support.models import pretrained as models
from tests.helpers import FORBIDDEN, PROMPTS, SEP

LAST = 1 - 2**-24  # the largest possible random number


@pytest.fixture
def policy64(policy):
    return policy[0].double(), policy[1]


def prompts_of(tokenizer, texts):
    return b.Prompts.from_tensors([models.encode_prompt(tokenizer, text) for text in texts], 0, "cpu")


def completions_of(tokenizer, texts, responses):
    return b.Completions(prompts_of(tokenizer, texts), responses, g.completion_mask(responses, SEP))


def draw(policy, texts, seed=1, step=1, gen_len=6, temperature=1.0, first=0, uniforms=None):
    model, tokenizer = policy
    if uniforms is None:
        uniforms = g.completion_uniforms(seed, step, range(first, first + len(texts)), gen_len)
    restriction = g.restriction(tokenizer, model.config.vocab_size)
    prompts = prompts_of(tokenizer, texts)
    return g.sample(model, prompts, uniforms, restriction, SEP, 0, temperature)[0]


def plain_forward(model, ids):
    """Return logits and values of a single sequence, without padding or a cache."""
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    return output.logits[0], output.value[0]


def always(policy, logits):
    """Change the policy so that these tokens have these logits in any context, and all others are impossible."""
    model, tokenizer = policy
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1
        model.transformer.wte.weight[:, 0] = -1e4
        for token, logit in logits.items():
            model.transformer.wte.weight[token, 0] = logit
    return model, tokenizer


@pytest.mark.parametrize("frozen_share", [0, 0.5, 1])
def test_shared_prompts_give_the_same_logits_and_values_as_single_sequences(policy64, frozen_share):
    """Prompts and responses have several lengths. The trunk may come from another model that shares it."""
    model, tokenizer = policy64
    torch.nn.init.normal_(model.v_head.summary.weight)
    model.freeze(frozen_share)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    texts = PROMPTS + PROMPTS
    completions = completions_of(tokenizer, texts, draw(policy64, texts))
    if frozen_share:
        prompt_states, states = SharedPrompts(reference).trunk(completions.prompts, completions.ids)
        prompts = dataclasses.replace(completions.prompts, hidden_states=prompt_states)
        completions = dataclasses.replace(completions, prompts=prompts, hidden_states=states)
    for rows in (slice(None), slice(1, 3), torch.tensor([4, 2, 5, 0])):  # some rows leave prompts unused
        part = completions.select(rows)
        states, values = SharedPrompts(model)(part)
        logits = model.lm_head(states)
        for row, i in enumerate(torch.arange(6)[rows].tolist()):
            query, length = models.encode_prompt(tokenizer, texts[i]).tolist(), int(part.mask[row].sum())
            single = plain_forward(model, query + part.ids[row, :length].tolist())
            for got, expected in zip((logits, values), single):
                assert torch.allclose(got[row, :length], expected[len(query) - 1 : -1], rtol=1e-9, atol=1e-9)


def test_the_gradient_of_shared_prompts_is_summed_in_float32():
    """Summed one by one in bfloat16, 1,024 gradients would be about 4% off. Here, only one rounding of 2^-8 remains."""
    prompts = b.Prompts(torch.zeros(3, 2, dtype=torch.int64), None, torch.arange(3072) % 3)
    states = torch.randn(3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.rand(3072, 2, 8).bfloat16()
    spread = prompts.spread(states)
    assert torch.allclose(spread, states.detach()[prompts.rows], rtol=2**-8)
    spread.backward(gradient)
    exact = gradient.double().view(1024, 3, 2, 8).sum(0)
    assert ((states.grad - exact).norm() / exact.norm()) < 2**-8 + 1024 * 2**-24


def test_gradients_are_bitwise_reproducible(policy):
    """The gradients of many completions are summed at one prompt. OMP_NUM_THREADS sets the number of threads."""
    texts = [PROMPTS[0]] * 256
    completions = completions_of(policy[1], texts, draw(policy, texts))
    gradients = []
    for _ in range(4):
        policy[0].zero_grad()
        policy[0].lm_head(SharedPrompts(policy[0])(completions)[0]).sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy[0].parameters() if p.grad is not None]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


def test_completion_mask_by_hand():
    responses = torch.tensor([[5, 3, 0, 0], [5, 6, 7, 8], [3, 0, 3, 0]])
    assert g.completion_mask(responses, 3).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_restricted_logits_by_hand():
    logits = torch.tensor([[0.0, 2.0, 4.0]])
    no_first = torch.tensor([-float("inf"), 0.0, 0.0])
    restricted = vocabulary.restrict_logits(logits, no_first, temperature=2.0)
    assert torch.equal(restricted, torch.tensor([[-float("inf"), 1.0, 2.0]]))
    assert vocabulary.restrict_logits(logits.bfloat16(), no_first, 1.0).dtype == torch.float32
    assert vocabulary.restrict_logits(logits.double(), no_first, 1.0).dtype == torch.float64


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(policy, temperature):
    """Checks the first and second token of 5,000 completions, within six standard errors for each of 78 shares."""
    n = 5_000
    responses = draw(policy, ["衣服"] * n, gen_len=2, temperature=temperature).numpy()
    query = models.encode_prompt(policy[1], "衣服").tolist()

    def probs(ids):
        logits = plain_forward(policy[0], ids)[0][-1].double() / temperature
        return logits.index_fill(0, torch.tensor(FORBIDDEN), -float("inf")).softmax(0).numpy()

    def agree(tokens, expected):
        share = np.bincount(tokens, minlength=len(expected)) / len(tokens)
        return (np.abs(share - expected) < 6 * np.sqrt(expected * (1 - expected) / len(tokens)) + 1e-12).all()

    first = probs(query)
    likely = int(np.where(np.arange(len(first)) == SEP, 0, first).argmax())
    assert agree(responses[:, 0], first)
    assert agree(responses[responses[:, 0] == likely, 1], probs([*query, likely]))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_a_batch_of_prompts_of_different_lengths_gives_the_same_samples_as_single_prompts(policy64, temperature):
    texts = PROMPTS * 5
    one_by_one = [draw(policy64, [text], first=i, temperature=temperature)[0] for i, text in enumerate(texts)]
    assert torch.equal(draw(policy64, texts, temperature=temperature), torch.stack(one_by_one))


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 2}, {"first": 1}])
def test_samples_depend_only_on_seed_step_and_index(policy64, other):
    texts = PROMPTS[:1] * 12
    whole = draw(policy64, texts)
    assert torch.equal(whole, torch.cat([draw(policy64, texts[:5]), draw(policy64, texts[5:], first=5)]))
    assert not torch.equal(whole, draw(policy64, texts, **other))


def test_random_numbers_come_from_philox_with_seed_step_and_index():
    one = g.completion_uniforms(1, 2, [0, 5], 8)
    assert not torch.equal(one, g.completion_uniforms(2, 1, [0, 5], 8))
    assert not torch.equal(g.completion_uniforms(2**63 - 1, 0, [0], 8), g.completion_uniforms(0, 0, [0], 8))
    philox = np.random.Generator(np.random.Philox(key=[1, 2], counter=[0, 0, 0, 5]))
    assert one[1].tolist() == philox.random(8, np.float32).tolist()


@pytest.mark.parametrize(
    ("logits", "draws", "expected"),
    [
        ({5: 0, 6: 0, 7: 0, 8: 0}, [0, 0.25 - 2**-24, 0.25, 0.5, 0.75, LAST], [5, 5, 6, 7, 8, 8]),
        ({5: 1, 6: 1, 7: 1, 8: 1}, [0.1, 0.9], [5, 8]),
        ({7: 0, 40: 0, 0: 9, 1: 9, 2: 9, 4: 9}, [0, LAST, 0.5, 0.5 - 2**-24], [7, 40, 40, 7]),
        ({3: 0, 5: 0, 6: 0, 7: 0}, [0.3, 0.9, 0.1, 0.3], [5, 7, 3, 0]),  # the end, then padding
    ],
)
def test_sampling_picks_the_first_token_whose_cumulative_probability_exceeds_the_draw(policy, logits, draws, expected):
    """Tokens with the same logit are equally likely. Special tokens and the rest of the vocabulary are impossible."""
    assert draw(always(policy, logits), ["衣服"], uniforms=torch.tensor([draws])).tolist() == [expected]


def test_the_largest_random_number_gives_a_valid_token_despite_rounding(policy):
    """Probabilities in float32 rarely add up to exactly 1, and often to less than the largest random number."""
    texts = [first + second for first in "刚收到货感觉很不错好" for second in "评差质量快递物流"]
    responses = draw(policy, texts, uniforms=torch.full((len(texts), 4), LAST))
    assert responses.min() >= 5 and responses.max() <= 42


def test_sampling_stops_once_all_completions_have_ended(policy):
    """One completion ends at the third of thirty tokens and the other at the tenth."""
    policy, calls = always(policy, dict.fromkeys([3, 5, 6, 7], 0.0)), []
    policy[0].lm_head.register_forward_hook(lambda *_: calls.append(1))
    draws = torch.full((2, 30), 0.3)
    draws[0, 1], draws[0, 2], draws[1, 9], draws[:, 15:] = 0.9, 0.1, 0.2, 0.6
    expected = [[5, 7, 3] + [0] * 27, [5] * 9 + [3] + [0] * 20]
    assert draw(policy, PROMPTS[:2], uniforms=draws).tolist() == expected and len(calls) < 20


@pytest.mark.parametrize("part", ["wpe.weight", "ln_f.bias"])
def test_nan_logits_raise_an_error(policy, part):
    """They occur at one position of one prompt, or everywhere."""
    with torch.no_grad():
        policy[0].transformer.get_parameter(part)[7] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        draw(policy, ["衣服", "刚收到货,感觉"], gen_len=4)
