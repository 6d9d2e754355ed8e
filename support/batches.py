"""Prompts and completions as the models take them, and what cannot be made of them said in one line.

Shapes: n completions, T tokens (completions are right-padded to the longest), P tokens of the longest prompt.
"""

from dataclasses import dataclass, replace

import torch

from support.devices import to_device
from support.user_code import listed, shown, to_float32, to_ids


@dataclass
class Prompts:
    """The distinct prompts of a batch, left-padded, and which of them each completion continues.

    ids (prompts, P) int64. mask (prompts, P) int64, 0 at the padding, or None where all have one length.
    index (n,) int64, on the CPU: completion i continues prompt index[i]. rows: the same, on the prompts' device,
    and one_hot, (n, prompts) bool, as a matrix.
    hidden_states (prompts, P, hidden): what `SharedPrompts.trunk` made of them, or None.
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
        """Gather n 1-d token tensors, many of them usually equal."""
        queries = [tuple(query.tolist()) for query in query_tensors]
        distinct = list(dict.fromkeys(queries))
        longest = max(len(query) for query in distinct)
        padding = [longest - len(query) for query in distinct]
        ids = torch.tensor([[pad_token_id] * pad + list(query) for pad, query in zip(padding, distinct)])
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long() if any(padding) else None
        rows = {query: row for row, query in enumerate(distinct)}
        index = torch.tensor([rows[query] for query in queries])
        ids, mask = (None if tensor is None else to_device(tensor, device) for tensor in (ids, mask))
        return cls(ids, mask, index)

    def select(self, rows: torch.Tensor | slice) -> "Prompts":
        """The prompts of these completions only; rows on the CPU, where it is worked out which these are."""
        used, index = self.index[rows].unique(return_inverse=True)
        if len(used) == len(self.ids):
            return replace(self, index=index)
        ids, mask, hidden_states = select_rows(used, self.ids, self.mask, self.hidden_states)
        return Prompts(ids, mask, index, hidden_states)

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor (prompts, ...) of the distinct prompts as one of each completion's prompt, (n, ...).

        It is a product with a one-hot matrix for the sake of the gradient. That of picking by index adds up the
        completions of a prompt one by one in the tensor's dtype, on a GPU in another order each time; that of a product
        adds up in float32, in one order.
        """
        return (self.one_hot.to(tensor.dtype) @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])

    def mask_with(self, n_tokens: int) -> torch.Tensor | None:
        """Attention mask (n, P + n_tokens) of each completion's prompt followed by n_tokens of its own."""
        if self.mask is None:
            return None
        mask = self.mask[self.rows]
        return torch.cat([mask, mask.new_ones(len(mask), n_tokens)], dim=1)


@dataclass
class Completions:
    """A batch of completions and the prompts that they continue.

    ids (n, T) int64, right-padded. mask (n, T) bool, True at the real tokens, a final [SEP] included.
    hidden_states (n, T - 1, hidden): what `SharedPrompts.trunk` made of them, or None, as in `prompts`.
    """

    prompts: Prompts
    ids: torch.Tensor
    mask: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: torch.Tensor | slice) -> "Completions":
        """These completions only; rows, a tensor of them, on the CPU."""
        return Completions(self.prompts.select(rows), *select_rows(rows, self.ids, self.mask, self.hidden_states))


def select_rows(rows: torch.Tensor | slice, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Some rows of tensors on one device, None of None; rows, a tensor of them, on the CPU: nobody waits for a GPU."""
    if isinstance(rows, torch.Tensor):
        device = next((tensor.device for tensor in tensors if tensor is not None), rows.device)
        rows = to_device(rows, device)
    return [None if tensor is None else tensor[rows] for tensor in tensors]


def completion_mask(responses: torch.Tensor, sep_token_id: int) -> torch.Tensor:
    """True at a completion's tokens up to and including its first [SEP], (n, T) bool."""
    ended = (responses == sep_token_id).long().cumsum(-1)
    return (ended == 0) | ((ended == 1) & (responses == sep_token_id))


def never_sampled_ids(tokenizer, vocab_size: int) -> list[int]:
    """[PAD] [UNK] [CLS] [MASK]: every special token but the [SEP] that ends a text; and rows of the embeddings beyond
    the tokenizer's tokens, which only pad them to a round number."""
    return sorted({*tokenizer.all_special_ids, *range(len(tokenizer), vocab_size)} - {tokenizer.sep_token_id})


class Collator:
    """Makes batches of token ids for a GPT-2 and its tokenizer. ValueError where they could not have been sampled."""

    def __init__(self, tokenizer, gpt2_config, device):
        self.cls_token_id, self.sep_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self.vocab_size, self.n_positions = gpt2_config.vocab_size, gpt2_config.n_positions
        self.never_sampled = set(never_sampled_ids(tokenizer, gpt2_config.vocab_size))
        self.token_names = tokenizer.convert_ids_to_tokens
        self.device = device

    def token_ids(self, what: str, sequences) -> list[torch.Tensor]:
        """Token ids, tensors or lists, as 1-d int64 tensors on the CPU. ValueError where one is empty or unknown."""
        tensors = []
        for i, given in enumerate(entries(what, sequences)):
            if (ids := to_ids(given)) is None:
                wanted = f"a 1-d tensor or a list of token ids, not {shown(given)}"
                raise ValueError(f"{what} {i} must be {wanted}; a single {what} goes into a list, too")
            if not len(ids):
                raise ValueError(f"{what} {i} is empty; it needs at least one token")
            if ids.min() < 0 or ids.max() >= self.vocab_size:
                raise ValueError(f"{what} {i} holds an id outside the vocabulary of {self.vocab_size} tokens")
            tensors.append(ids)
        return tensors

    def queries(self, query_tensors, gen_len: int) -> list[torch.Tensor]:
        """Queries as `token_ids`. ValueError where one leaves no room for gen_len tokens, or ends a text."""
        query_tensors = self.token_ids("query", query_tensors)
        for i, query in enumerate(query_tensors):
            if query[-1] == self.sep_token_id != self.cls_token_id:
                end = self.token_names(self.sep_token_id)
                raise ValueError(f"query {i} ends with {end}, after which nothing is to follow; encode() leaves it out")
            if len(query) + gen_len > self.n_positions:
                more = f"with gen_len {gen_len} more than the model's {self.n_positions} positions"
                raise ValueError(f"query {i} has {len(query)} tokens, {more}")
        return query_tensors

    def prompts(self, query_tensors: list[torch.Tensor]) -> Prompts:
        return Prompts.from_tensors(query_tensors, self.pad_token_id, self.device)

    def completions(self, query_tensors, response_tensors) -> Completions:
        """Queries and their responses, lists of tensors or of lists of ids, as one padded batch."""
        query_tensors = self.token_ids("query", query_tensors)
        response_tensors = self.token_ids("response", response_tensors)
        for i, (query, response) in enumerate(zip(query_tensors, response_tensors)):
            if len(query) + len(response) > self.n_positions:
                have = f"have {len(query)} and {len(response)} tokens, and the model {self.n_positions} positions"
                raise ValueError(f"query {i} and its response {have}")
            tokens = response.tolist()
            tokens = tokens[: tokens.index(self.sep_token_id)] if self.sep_token_id in tokens else tokens
            for token in tokens:
                if token in self.never_sampled:
                    name = self.token_names(token) or f"id {token}"
                    raise ValueError(f"response {i} holds {name} before its end, a token that is never sampled")
        responses = torch.nn.utils.rnn.pad_sequence(response_tensors, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(response) for response in response_tensors])
        mask = completion_mask(responses, self.sep_token_id) & (torch.arange(responses.shape[1]) < lengths[:, None])
        ids, mask = (to_device(tensor, self.device) for tensor in (responses, mask))
        return Completions(self.prompts(query_tensors), ids, mask)

    def with_scores(self, query_tensors, response_tensors, scores) -> tuple[Completions, torch.Tensor]:
        """As `completions`, and the responses' scores, a list or tensor of n finite numbers, as (n,) float32."""
        queries, responses = entries("query", query_tensors), entries("response", response_tensors)
        scores = entries("reward", scores)
        if not len(queries) == len(responses) == len(scores) > 0:
            counts = f"{len(queries)} queries, {len(responses)} responses and {len(scores)} rewards"
            raise ValueError(f"step() needs one response and one reward for each query, not {counts}")
        completions = self.completions(queries, responses)
        scores, wrong = to_float32(scores)
        for i, score in wrong:
            raise ValueError(f"reward {i} is {score}: rewards must be finite numbers, one for each response")
        return completions, to_device(scores, self.device)


def entries(what: str, values) -> list:
    """The queries, responses or rewards of a batch. ValueError where they are no list or the like."""
    if (found := listed(values)) is None:
        raise ValueError(f"one {what} for each completion is needed, in a list or a tensor, not {shown(values)}")
    return found
