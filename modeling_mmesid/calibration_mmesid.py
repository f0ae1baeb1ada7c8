"""The start of a recommender around any decoder: item tokens as long as its words, and scores that hold nothing
settled."""

import math

import torch
from torch import nn


# Standard deviation of a user's scores over the catalogue at the start: the loss is half its square above ln N, and as
# much again off it where users agree on items that are rarer or more popular than others.
INITIAL_SPREAD = 0.2

# Random histories that are read for it: enough for the mean of their spreads, and cheap for a decoder of any size.
HISTORIES, LONGEST_HISTORY = 32, 8

# Items whose scores are measured, about: of larger catalogues one in so many.
MEASURED_ITEMS = 2**17

# Rows of a table that are measured at a time.
ROWS_PER_BLOCK = 2**14


class MMESIDUserHead(nn.Module):
    """
    The user vector of a decoder's state: u = exp(s) h. The learnt factor is kept as its logarithm, so that a step of
    the optimizer changes it by the same share however small it is; decoders differ a hundredfold in the length of
    their states.
    """

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """User vectors of states, both `(..., hidden)`."""
        return states * self.log_scale.exp()


def mean_length(vectors, rows: torch.Tensor) -> float:
    """Mean norm of `vectors(rows)`, `(rows, hidden)`, computed in blocks."""
    lengths = [vectors(block).float().norm(dim=-1).sum(dtype=torch.float64) for block in rows.split(ROWS_PER_BLOCK)]
    return float(sum(lengths)) / len(rows)


def random_histories(frequencies: torch.Tensor, longest: int) -> list[list[int]]:
    """Histories of rows drawn as often as they occur in training, `frequencies` `(items + 1,)`, and once more, for
    items that do not. The same each time, whatever the state of torch's generator, which is left alone."""
    generator = torch.Generator().manual_seed(0)
    weights = frequencies.cpu().double() + 1
    weights[0] = 0
    lengths = torch.randint(1, min(longest, LONGEST_HISTORY) + 1, (HISTORIES,), generator=generator).tolist()
    rows = torch.multinomial(weights, sum(lengths), replacement=True, generator=generator)
    return [part.tolist() for part in rows.split(lengths)]


def log_scale_for_spread(states: torch.Tensor, table: torch.Tensor) -> float:
    """The logarithm of the factor on `states`, `(users, hidden)`, that gives the scores of the items of `table`,
    `(items, hidden)`, a standard deviation of `INITIAL_SPREAD` over the catalogue, for a user on average; 0 where the
    scores do not differ."""
    spread = float((states.float() @ table.float().T).std(dim=-1, correction=0).mean())
    return math.log(INITIAL_SPREAD / spread) if spread > 0 else 0.0
