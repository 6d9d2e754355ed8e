"""A loop of one's own, in Python: what the README shows works as pasted."""

import copy

import pytest
import torch

from tests.test_trainer import make


def test_queries_one_at_a_time_draw_what_one_call_draws(policy):
    trainer = make(policy)
    query = torch.tensor([2, 5, 6])
    at_once = trainer.generate([query] * 16)
    trainer.step([query] * 16, at_once, torch.arange(16) / 16)
    second = trainer.generate([query] * 16)

    twin = make((trainer.ref_model, policy[1]))
    one_by_one = [twin.generate([query])[0] for _ in range(16)]
    assert all(map(torch.equal, at_once, one_by_one))
    assert len({tuple(response.tolist()) for response in one_by_one}) > 8
    assert not all(map(torch.equal, at_once, second))
    assert all(map(torch.equal, second, trainer.generate([query] * 16, step=2)))
    halves = make((trainer.ref_model, policy[1]))
    assert all(map(torch.equal, at_once, halves.generate([query] * 8) + halves.generate([query] * 8)))


def test_judging_draws_do_not_count(policy):
    trainer, twin = make(policy), make(policy)
    query = torch.tensor([2, 5, 6])
    trainer.generate([query] * 4, trainer.ref_model, seed=9, step=0)
    assert all(map(torch.equal, trainer.generate([query] * 4), twin.generate([query] * 4)))


QUERY, RESPONSE = [2, 5, 6], [7, 8, 3]


@pytest.mark.parametrize(
    ("queries", "responses", "rewards", "said"),
    [
        ([QUERY] * 2, [RESPONSE] * 2, [0.5, float("nan")], "reward 1 is nan"),
        ([QUERY] * 2, [RESPONSE] * 2, [float("inf"), 0.5], "reward 0 is inf"),
        ([QUERY] * 2, [RESPONSE] * 2, torch.zeros(2, 1), r"shape \(2,\), one number a response, not \(2, 1\)"),
        ([QUERY, []], [RESPONSE] * 2, [0.5, 0.1], "query 1 is empty"),
        ([QUERY, [2, 999]], [RESPONSE] * 2, [0.5, 0.1], "query 1 holds an id outside the vocabulary of 43"),
        ([QUERY] * 2, [[-1], RESPONSE], [0.5, 0.1], "response 0 holds an id outside"),
        ([QUERY, [5] * 46], [RESPONSE] * 2, [0.5, 0.1], "query 1 and its response have 46 and 3 tokens.* 48 positions"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_moves(policy, queries, responses, rewards, said):
    trainer = make(policy)
    with pytest.raises(ValueError, match=said):
        trainer.step(queries, responses, rewards)
    assert trainer.n_steps == 0


def test_lists_of_ids_are_taken(policy):
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]))
    responses = trainer.generate([QUERY] * 4)
    stats = trainer.step([QUERY] * 4, [response.tolist() for response in responses], [0.1, 0.9, 0.5, 0.3])
    assert twin.step([torch.tensor(QUERY)] * 4, responses, torch.tensor([0.1, 0.9, 0.5, 0.3])) == stats
