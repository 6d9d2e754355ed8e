"""Sampling and the forward passes: the right distribution, whatever the batch looks like."""

import copy

import numpy as np
import pytest
import torch

import gpt2_value_head as g
from ppo import entropy_from_logits, logprobs_from_logits
from support import batches as b
from support import models
from support.shared_prompts import SharedPrompts

PROMPTS = ["刚收到货,感觉", "衣服", "这本书很好"]


def prompts_of(tokenizer, texts):
    return b.Prompts.from_tensors(
        [models.encode_prompt(tokenizer, text) for text in texts], tokenizer.pad_token_id, "cpu"
    )


def completions_of(tokenizer, texts, responses):
    return b.Completions(prompts_of(tokenizer, texts), responses, b.completion_mask(responses, tokenizer.sep_token_id))


def draw(model, tokenizer, texts, seed=1, step=1, gen_len=6, temperature=1.0, first=0, uniforms=None):
    if uniforms is None:
        uniforms = g.completion_uniforms(seed, step, range(first, first + len(texts)), gen_len)
    special = g.restriction(tokenizer, model.config.vocab_size), tokenizer.sep_token_id, tokenizer.pad_token_id
    return g.sample(model, prompts_of(tokenizer, texts), uniforms, *special, temperature)


def plain_forward(model, ids):
    """Logits and values of one unpadded sequence, no cache, no batch: the reference for everything else."""
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    return output.logits[0], output.value[0]


def always(policy, logits):
    """The policy, changed: whatever came before, these tokens have these logits, and no other has a chance."""
    model, tokenizer = policy
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1
        model.transformer.wte.weight[:, 0] = -1e4
        for token, logit in logits.items():
            model.transformer.wte.weight[token, 0] = logit
    return model, tokenizer


def test_forward_names_and_shapes(policy):
    model, _ = policy
    output = model(torch.tensor([[2, 5, 6], [2, 7, 8]]), use_cache=True)
    assert output.logits.shape == (2, 3, model.config.vocab_size)
    assert output.value.shape == (2, 3) and (output.value == 0).all()
    assert output.past_key_values.get_seq_length() == 3
    assert model.lm_head.weight is model.transformer.wte.weight


def test_forward_with_cache_equals_forward_without(policy):
    model, _ = policy
    ids = torch.tensor([[2, 5, 6, 7, 8]])
    first = model(ids[:, :3], use_cache=True)
    rest = model(ids[:, 3:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_forward_is_the_same_with_padding_on_either_side(policy, left):
    model, _ = policy
    ids, pad = [2, 5, 6, 7], [0, 0]
    padded = torch.tensor([pad + ids if left else ids + pad])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1] if left else [1, 1, 1, 1, 0, 0]])
    logits = (
        model(padded, attention_mask=mask).logits[0, 2:] if left else model(padded, attention_mask=mask).logits[0, :4]
    )
    assert torch.allclose(logits, plain_forward(model, ids)[0], atol=1e-5)


def test_a_padded_batch_goes_on_from_its_cache(policy):
    model, _ = policy
    padded, mask = torch.tensor([[0, 0, 2, 5], [2, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    start = model(padded, attention_mask=mask, use_cache=True)
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], dim=1)
    rest = model(torch.tensor([[8, 9], [8, 9]]), attention_mask=mask, past_key_values=start.past_key_values)
    for logits, ids in zip(rest.logits, ([2, 5, 8, 9], [2, 5, 6, 7, 8, 9])):
        assert torch.allclose(logits, plain_forward(model, ids)[0][-2:], atol=1e-5)


@pytest.mark.parametrize("frozen_share", [0, 0.5, 1])
def test_shared_prompts_equal_one_sequence_at_a_time(policy, frozen_share):
    """Prompts of three lengths, shared prefill, responses of several lengths: every real position as if alone.

    What lies under the trained blocks may come from another model that shares the frozen ones.
    """
    model, tokenizer = policy
    torch.nn.init.normal_(model.v_head.summary.weight)
    model.freeze(frozen_share)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    texts = PROMPTS + PROMPTS
    responses = draw(model, tokenizer, texts)
    completions = completions_of(tokenizer, texts, responses)
    if frozen_share:
        completions = SharedPrompts(reference).trunk(completions)
    logits, values = SharedPrompts(model)(completions)
    for i, text in enumerate(texts):
        query = models.encode_prompt(tokenizer, text).tolist()
        length = int(completions.mask[i].sum())
        alone_logits, alone_values = plain_forward(model, query + responses[i, :length].tolist())
        at = slice(len(query) - 1, len(query) - 1 + length)
        assert torch.allclose(logits[i, :length], alone_logits[at], atol=1e-5)
        assert torch.allclose(values[i, :length], alone_values[at], atol=1e-5)


def test_the_gradient_of_shared_prompts_adds_up_in_float32(policy):
    """In bfloat16 1,024 completions' gradients of one prompt, taken one by one, would be some 4% off."""
    prompts = b.Prompts(torch.zeros(3, 2, dtype=torch.int64), None, torch.arange(3072) % 3)
    states = torch.randn(3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.rand(3072, 2, 8).bfloat16()
    spread = prompts.spread(states)
    assert torch.equal(spread, states.detach()[prompts.rows])
    spread.backward(gradient)
    exact = gradient.double().view(1024, 3, 2, 8).sum(0)
    assert ((states.grad - exact).norm() / exact.norm()) < 0.003


def test_no_gradient_is_added_up_by_index(policy):
    """On a GPU that goes by atomic additions: another sum each time."""
    model, tokenizer = policy
    model.freeze(0.5)
    texts = PROMPTS * 2
    logits, values = SharedPrompts(model)(completions_of(tokenizer, texts, draw(model, tokenizer, texts)))
    seen, nodes = set(), [logits.grad_fn, values.grad_fn]
    while nodes:
        seen.add(node := nodes.pop())
        nodes += {before for before, _ in node.next_functions if before is not None} - seen
    names = {node.name() for node in seen}
    assert "MmBackward0" in names and not {name for name in names if "Index" in name or "Gather" in name}


def test_prompts_of_different_lengths_sample_as_each_would_alone(policy):
    model, tokenizer = policy
    texts = PROMPTS * 5
    together = draw(model, tokenizer, texts)
    alone = [draw(model, tokenizer, [text], first=i)[0] for i, text in enumerate(texts)]
    assert torch.equal(together, torch.stack(alone))


def test_randomness_depends_on_seed_step_and_index_alone(policy):
    model, tokenizer = policy
    whole = draw(model, tokenizer, PROMPTS[:1] * 12)
    split = torch.cat(
        [draw(model, tokenizer, PROMPTS[:1] * 5, first=0), draw(model, tokenizer, PROMPTS[:1] * 7, first=5)]
    )
    assert torch.equal(whole, split)
    for other in ({"seed": 2}, {"step": 2}, {"first": 1}):
        assert not torch.equal(whole, draw(model, tokenizer, PROMPTS[:1] * 12, **other))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(policy, temperature):
    """First and second token of 5,000 completions against probabilities worked out from plain forward passes."""
    model, tokenizer = policy
    n = 5_000
    responses = draw(model, tokenizer, ["衣服"] * n, gen_len=2, temperature=temperature).numpy()
    query = models.encode_prompt(tokenizer, "衣服").tolist()
    forbidden = [tokenizer.convert_tokens_to_ids(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[MASK]")]

    def probs(ids):
        logits = plain_forward(model, ids)[0][-1].double().numpy() / temperature
        logits[forbidden] = -np.inf
        exp = np.exp(logits - logits.max())
        return exp / exp.sum()

    first = probs(query)
    observed = np.bincount(responses[:, 0], minlength=len(first)) / n
    assert np.abs(observed - first).max() < 4 * np.sqrt(0.25 / n)
    likely = int(np.argmax(np.where(np.arange(len(first)) == tokenizer.sep_token_id, 0, first)))
    follow = responses[responses[:, 0] == likely, 1]
    observed = np.bincount(follow, minlength=len(first)) / len(follow)
    assert np.abs(observed - probs(query + [likely])).max() < 4 * np.sqrt(0.25 / len(follow))


def test_special_tokens_are_never_sampled_and_sep_ends(policy):
    model, tokenizer = policy
    with torch.no_grad():  # a model that wants nothing but special tokens
        model.transformer.wte.weight[:5] *= 5
    responses = draw(model, tokenizer, PROMPTS * 100, gen_len=8)
    mask = b.completion_mask(responses, tokenizer.sep_token_id)
    assert not torch.isin(responses[mask], torch.tensor([0, 1, 2, 4])).any()
    assert (responses[~mask] == tokenizer.pad_token_id).all()
    ended = (responses == tokenizer.sep_token_id).any(1)
    assert (
        ended.any()
        and (responses[ended].gather(1, mask[ended].sum(1, keepdim=True) - 1) == tokenizer.sep_token_id).all()
    )


def test_completion_mask_by_hand():
    responses = torch.tensor([[5, 3, 0, 0], [5, 6, 7, 8], [3, 0, 0, 0]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(b.completion_mask(responses, 3), expected)


def test_restricted_logits_by_hand():
    logits = torch.tensor([[0.0, 2.0, 4.0]])
    no_first = torch.tensor([-float("inf"), 0.0, 0.0])
    restricted = g.restrict_logits(logits, no_first, temperature=2.0)
    assert torch.equal(restricted, torch.tensor([[-float("inf"), 1.0, 2.0]]))
    assert g.restrict_logits(logits.bfloat16(), no_first, 1.0).dtype == torch.float32
    assert g.restrict_logits(logits.double(), no_first, 1.0).dtype == torch.float64
    assert entropy_from_logits(restricted).isfinite().all()
    assert logprobs_from_logits(restricted, torch.tensor([1])).item() == pytest.approx(-np.log(1 + np.e))


def test_prompts_are_encoded_with_cls_and_without_sep(policy):
    _, tokenizer = policy
    ids = models.encode_prompt(tokenizer, "衣服").tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "衣", "服"]


def test_value_gradient_stays_out_of_the_transformer_only_when_detached(policy):
    model, tokenizer = policy
    torch.nn.init.normal_(model.v_head.summary.weight)
    completions = completions_of(tokenizer, PROMPTS, draw(model, tokenizer, PROMPTS))
    for detach in (True, False):
        twin = copy.deepcopy(model)
        SharedPrompts(twin, detach)(completions)[1].sum().backward()
        assert (twin.transformer.ln_f.weight.grad is None) == detach
        assert twin.v_head.summary.weight.grad.abs().sum() > 0


def test_gradients_are_the_same_to_the_bit_each_time(policy):
    """On several threads and with many completions of one prompt, whose gradients all add up in it."""
    model, tokenizer = policy
    texts = ["刚收到货,感觉很不错"] * 256
    completions = completions_of(tokenizer, texts, draw(model, tokenizer, texts))
    gradients = []
    for _ in range(6):
        model.zero_grad()
        SharedPrompts(model)(completions)[0].sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


LAST = 1 - 2**-24  # the largest number that a draw can be


def test_a_draw_takes_the_first_token_whose_cumulative_probability_exceeds_it(policy):
    model, tokenizer = always(policy, dict.fromkeys([5, 6, 7, 8], 0.0))  # a quarter each, exactly
    draws = torch.tensor([[0, 0.25 - 2**-24, 0.25, 0.5, 0.75, LAST]])
    assert draw(model, tokenizer, ["衣服"], uniforms=draws).tolist() == [[5, 5, 6, 7, 8, 8]]


def test_the_ends_of_the_draws_are_the_ends_of_the_possible_tokens(policy):
    """Neither a special token before them nor the last row of the vocabulary where that cannot be sampled."""
    model, tokenizer = always(policy, {0: 9.0, 1: 9.0, 2: 9.0, 4: 9.0, 7: 0.0, 40: 0.0})
    draws = torch.tensor([[0.0, LAST, 0.0, LAST]])
    assert draw(model, tokenizer, ["衣服"], uniforms=draws).tolist() == [[7, 40, 7, 40]]


def test_the_largest_draw_is_a_token_whatever_the_rounding(policy):
    """Probabilities in float32 rarely add up to 1: often to less than the largest draw."""
    model, tokenizer = policy
    texts = [first + second for first in "刚收到货感觉很不错好" for second in "评差质量快递物流"]
    responses = draw(model, tokenizer, texts, uniforms=torch.full((len(texts), 4), LAST))
    assert responses.min() >= 5 and responses.max() <= 42


def test_completions_that_end_early_do_not_end_the_others(policy):
    """One ends at the third token, one at the tenth of twenty; a draw below a quarter is [SEP]."""
    model, tokenizer = always(policy, dict.fromkeys([3, 5, 6, 7], 0.0))
    draws = torch.full((2, 20), 0.3)
    draws[0, 1], draws[0, 2], draws[1, 9], draws[:, 15:] = 0.9, 0.1, 0.2, 0.6
    expected = [[5, 7, 3] + [0] * 17, [5] * 9 + [3] + [0] * 10]
    assert draw(model, tokenizer, PROMPTS[:2], uniforms=draws).tolist() == expected


def test_where_all_have_ended_the_model_is_left_alone(policy):
    model, tokenizer = always(policy, {3: 0.0})
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    responses = draw(model, tokenizer, PROMPTS, gen_len=30)
    assert responses.tolist() == [[3] + [0] * 29] * 3 and len(calls) <= 8


def test_draws_are_float32_from_0_to_below_1_and_no_two_completions_share_a_stretch_of_them():
    uniforms = g.completion_uniforms(1, 1, range(200), 32)
    assert uniforms.shape == (200, 32) and uniforms.dtype == torch.float32
    assert 0 <= uniforms.min() < 0.01 and 0.99 < uniforms.max() < 1
    assert abs(uniforms.mean().item() - 0.5) < 0.01
    pairs = {pair for row in uniforms.tolist() for pair in zip(row, row[1:])}
    assert len(pairs) == 200 * 31


def test_draws_know_the_seed_from_the_step_and_go_on_where_a_batch_was_split():
    one = g.completion_uniforms(1, 2, [0, 5], 8)
    assert not torch.equal(one, g.completion_uniforms(2, 1, [0, 5], 8))
    assert torch.equal(one[1:], g.completion_uniforms(1, 2, [5], 8))
    assert torch.equal(one[:, :3], g.completion_uniforms(1, 2, [0, 5], 3))
    assert not torch.equal(g.completion_uniforms(2**63 - 1, 0, [0], 8), g.completion_uniforms(0, 0, [0], 8))


def test_nan_at_one_position_of_one_prompt_is_told(policy):
    model, tokenizer = policy
    with torch.no_grad():
        model.transformer.wpe.weight[7] = torch.nan
    draw(model, tokenizer, ["衣服"], gen_len=4)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        draw(model, tokenizer, ["衣服", "刚收到货,感觉"], gen_len=4)


def test_nan_logits_are_told_and_not_embedded(policy):
    model, tokenizer = policy
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        draw(model, tokenizer, ["衣服"])
