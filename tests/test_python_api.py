"""A loop of one's own, in Python: what the README shows works as pasted."""

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
