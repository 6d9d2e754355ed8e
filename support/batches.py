"""Prompts and completions as the models take them. Shapes: n completions, T tokens, P tokens of the longest prompt."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from gpt2_value_head import completion_mask, never_sampled_ids
from support.devices import to_device
from support.user_code import listed, shown, to_float32, to_ids


@dataclass
class Prompts:
    """The distinct prompts of a batch, left-padded, and which of them each completion continues.

    ids (prompts, P) int64. mask (prompts, P) int64, 0 at the padding, or None if all have the same length. index (n,)
    int64 on the CPU: completion i continues prompt index[i]; rows is its copy on the prompts' device, and one_hot is
    (n, prompts) bool. hidden_states (prompts, P, hidden): the output of `SharedPrompts.trunk`, or None.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    index: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def __post_init__(self):
        self.rows = to_device(self.index, self.ids.device)
        self.one_hot = self.rows[:, None] == torch.arange(len(self.ids), device=self.ids.device)

    @classmethod
    def from_tensors(cls, query_tensors: list[torch.Tensor], pad_token_id: int, device) -> "Prompts":
        """Collect the distinct prompts of n 1-d token tensors, many of which are usually equal."""
        queries = [tuple(query.tolist()) for query in query_tensors]
        distinct = list(dict.fromkeys(queries))
        ids = pad_sequence([torch.tensor(query) for query in distinct], True, pad_token_id, padding_side="left")
        padding = torch.tensor([ids.shape[1] - len(query) for query in distinct])
        mask = (torch.arange(ids.shape[1]) >= padding[:, None]).long() if padding.any() else None
        rows = {query: row for row, query in enumerate(distinct)}
        index = torch.tensor([rows[query] for query in queries])
        ids, mask = (None if tensor is None else to_device(tensor, device) for tensor in (ids, mask))
        return cls(ids, mask, index)

    def select(self, rows: torch.Tensor | slice) -> "Prompts":
        """Keep only the prompts of these completions. rows: a slice, or a tensor on the CPU."""
        used, index = self.index[rows].unique(return_inverse=True)
        ids, mask, hidden_states = select_rows(used, self.ids, self.mask, self.hidden_states)
        return Prompts(ids, mask, index, hidden_states)

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """Repeat a tensor (prompts, ...) of the distinct prompts for each completion, (n, ...). The product with a
        one-hot matrix sums the gradient in float32, always in the same order; indexing would not."""
        return (self.one_hot.to(tensor.dtype) @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])

    def mask_with(self, n_tokens: int) -> torch.Tensor | None:
        """Attention mask (n, P + n_tokens) of each completion's prompt and n_tokens of the completion, or None."""
        if self.mask is None:
            return None
        mask = self.mask[self.rows]
        return torch.cat([mask, mask.new_ones(len(mask), n_tokens)], dim=1)


@dataclass
class Completions:
    """A batch of completions and the prompts that they continue.

    ids (n, T) int64, right-padded. mask (n, T) bool, True at the real tokens, including a final [SEP].
    hidden_states (n, T - 1, hidden) as in `prompts`, or None.
    """

    prompts: Prompts
    ids: torch.Tensor
    mask: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: torch.Tensor | slice) -> "Completions":
        """Keep only these completions. rows: a slice, or a tensor on the CPU."""
        return Completions(self.prompts.select(rows), *select_rows(rows, self.ids, self.mask, self.hidden_states))


def select_rows(rows: torch.Tensor | slice, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Select rows of tensors on one device; None stays None. rows: a slice, or a tensor on the CPU."""
    if isinstance(rows, torch.Tensor):
        rows = to_device(rows, tensors[0].device)
    return [None if tensor is None else tensor[rows] for tensor in tensors]


class Collator:
    """Makes batches of token ids for a GPT-2 and its tokenizer. Raises ValueError if the ids cannot be trained on."""

    def __init__(self, tokenizer, gpt2_config, device):
        self.tokenizer, self.device = tokenizer, device
        self.sep_token_id, self.pad_token_id = tokenizer.sep_token_id, tokenizer.pad_token_id
        self.vocab_size, self.n_positions = gpt2_config.vocab_size, gpt2_config.n_positions
        self.never_sampled = set(never_sampled_ids(tokenizer, gpt2_config.vocab_size))

    def token_ids(self, what: str, sequences) -> list[torch.Tensor]:
        """Convert token ids, in tensors, arrays or lists, to 1-d int64 tensors on the CPU. what: name in errors"""
        if (found := listed(sequences)) is None:
            raise ValueError(f"a list with one {what} for each completion is needed, not {shown(sequences)}")
        for i, ids in enumerate(tensors := [to_ids(ids) for ids in found]):
            if ids is None or not len(ids):
                raise ValueError(f"{what} {i} must be a 1-d tensor or a list of token ids, not {shown(found[i])}")
            if ids.min() < 0 or ids.max() >= self.vocab_size:
                raise ValueError(f"{what} {i} has an id outside the vocabulary of {self.vocab_size} tokens")
        return tensors

    def queries(self, query_tensors, gen_len: int) -> list[torch.Tensor]:
        """Convert queries with `token_ids`; each must leave room for gen_len tokens and not end with [SEP]."""
        for i, query in enumerate(query_tensors := self.token_ids("query", query_tensors)):
            if query[-1] == self.sep_token_id != self.tokenizer.cls_token_id:
                raise ValueError(f"query {i} ends with {self.tokenizer.sep_token}, which ends a text; remove it")
            if len(query) + gen_len > self.n_positions:
                raise ValueError(f"query {i}: {len(query)} tokens + gen_len {gen_len} > {self.n_positions} positions")
        return query_tensors

    def completions(self, query_tensors, response_tensors) -> Completions:
        """Pad queries and their responses, lists of tensors or of lists of ids, to one batch."""
        query_tensors = self.token_ids("query", query_tensors)
        response_tensors = self.token_ids("response", response_tensors)
        if not len(query_tensors) == len(response_tensors) > 0:
            raise ValueError(f"{len(query_tensors)} queries need as many responses, not {len(response_tensors)}")
        for i, (query, response) in enumerate(zip(query_tensors, response_tensors)):
            if len(query) + len(response) > self.n_positions:
                raise ValueError(f"text {i}: {len(query)} + {len(response)} tokens > {self.n_positions} positions")
            sampled = response[completion_mask(response, self.sep_token_id)].tolist()
            if forbidden := self.never_sampled.intersection(sampled):
                names = self.tokenizer.convert_ids_to_tokens(sorted(forbidden))
                raise ValueError(f"response {i} has {names} before its end, which are never sampled")
        responses = pad_sequence(response_tensors, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(response) for response in response_tensors])
        mask = completion_mask(responses, self.sep_token_id) & (torch.arange(responses.shape[1]) < lengths[:, None])
        ids, mask = (to_device(tensor, self.device) for tensor in (responses, mask))
        return Completions(Prompts.from_tensors(query_tensors, self.pad_token_id, self.device), ids, mask)

    def scores(self, rewards, n: int) -> torch.Tensor:
        """Convert n finite numbers in a list, tensor or array to (n,) float32."""
        if (found := listed(rewards)) is None or len(found) != n:
            raise ValueError(f"a list or tensor of {n} rewards, one for each response, is needed, not {shown(rewards)}")
        scores, wrong = to_float32(found)
        for i, score in wrong:
            raise ValueError(f"reward {i} is {score}: rewards must be finite numbers, one for each response")
        return to_device(scores, self.device)
