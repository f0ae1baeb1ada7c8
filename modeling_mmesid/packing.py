"""Histories as model inputs: all prefixes of a user in one sequence, or the whole history alone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence


def pack_histories(
    histories: Sequence[np.ndarray | Sequence[int]],
    suffix_ids: Sequence[int],
    targets: Sequence[np.ndarray | Sequence[int]] | None = None,
    pad_to_multiple_of: int = 1,
    packed: bool = True,
) -> dict[str, torch.Tensor]:
    r"""
    Lays each user out as `items 1..T | closing tokens ...`, padded on the right. The prompt before the items, which
    all users share, is the model's part.

    Without `targets` the closing tokens follow the whole history once: the inference form. With `targets` (the item
    after each position) one copy of the closing tokens is added for each position t; it sees items 1..t and itself, at
    the position ids that it would have if the user had only those items. The hidden states are those of one sequence
    per prefix, at a fraction of the cost (section 2.5 of the method). With no closing tokens the items themselves
    answer: the ordinary next-item objective.

    `histories` are `batch` sequences of item rows, oldest first, none empty; `targets`, as long as these, hold -100
    where nothing is to be predicted. The state of the last closing token in `suffix_ids` represents the user. The
    padded length is a multiple of `pad_to_multiple_of`: fewer shapes mean fewer kernels to build and less memory in
    pieces. `packed=False` gives each prefix with a target a row of its own, for backbones whose attention cannot take
    the mask of packed sequences.

    Returns:
        `dict[str, torch.Tensor]`, of shape `(batch, length)` where nothing else is said:
            - **input_ids** and **items**: tokens and item rows, 0 where the other or padding stands.
            - **lengths** (of shape `(batch,)`, without `targets`): positions of each sequence; the last is the user's.
            - **labels** (with `targets`): target row where a user is read, -100 elsewhere.
            - **position_ids** (with `targets` and closing tokens): positions to the backbone; else they count.
            - **shared_length** (likewise): how many leading positions each position sees.
            - **segment_ids** (likewise): the copy of the closing tokens that a position belongs to, 0 for the items,
              which all copies share, -1 for padding.
    """
    suffix = np.asarray(suffix_ids, dtype=np.int64)
    if targets is not None and len(suffix) and not packed:
        return _one_prefix_per_row(histories, targets, suffix_ids, pad_to_multiple_of)
    rows = []
    for index, history in enumerate(histories):
        length, copies, row = len(history), 1, {}
        if targets is not None:
            following = np.asarray(targets[index], dtype=np.int64)
            answered = np.flatnonzero(following != -100)
            copies, seen = len(answered), answered + 1
            row["labels"] = following
            if len(suffix):
                row["labels"] = np.full(length + copies * len(suffix), -100)
                row["labels"][length + len(suffix) - 1 :: len(suffix)] = following[answered]
                positions = (seen[:, None] + np.arange(len(suffix))).ravel()
                row["position_ids"] = np.concatenate([np.arange(length), positions])
                row["shared_length"] = np.concatenate([np.arange(1, length + 1), np.repeat(seen, len(suffix))])
                row["segment_ids"] = np.repeat(np.arange(copies + 1), [length] + copies * [len(suffix)])
        closing = np.tile(suffix, copies)
        row["input_ids"] = np.concatenate([np.zeros(length, np.int64), closing])
        row["items"] = np.concatenate([np.asarray(history, dtype=np.int64), np.zeros_like(closing)])
        rows.append(row)
    batch = {}
    for name in rows[0]:
        padding = {"labels": -100, "segment_ids": -1}.get(name, 0)
        values = pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding)
        batch[name] = nn.functional.pad(values, (0, -values.shape[1] % pad_to_multiple_of), value=padding)
    if targets is None:
        batch["lengths"] = torch.tensor([len(row["items"]) for row in rows])
    return batch


def _one_prefix_per_row(histories, targets, suffix_ids, pad_to_multiple_of) -> dict[str, torch.Tensor]:
    """The training examples of [`pack_histories`] in its inference form, with the label where the prefix is read."""
    prefixes, answers = [], []
    for history, following in zip(histories, targets, strict=True):
        for position in np.flatnonzero(np.asarray(following) != -100):
            prefixes.append(history[: position + 1])
            answers.append(int(following[position]))
    batch = pack_histories(prefixes, suffix_ids, pad_to_multiple_of=pad_to_multiple_of)
    batch["labels"] = torch.full_like(batch["items"], -100)
    batch["labels"][torch.arange(len(answers)), batch.pop("lengths") - 1] = torch.tensor(answers)
    return batch


def prepend_prompt(
    count: int, position_ids: torch.Tensor, shared_length: torch.Tensor, segment_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What [`pack_histories`] says of packed sequences, `(batch, length)`, with `count` prompt tokens in front."""
    prompt = torch.arange(count, device=segment_ids.device).expand(len(segment_ids), count)
    return (
        torch.cat([prompt, position_ids + count], dim=1),
        torch.cat([prompt + 1, shared_length + count], dim=1),
        torch.cat([torch.zeros_like(prompt), segment_ids], dim=1),
    )


def _visibility(shared_length: torch.Tensor, segment_ids: torch.Tensor, prompt_length: int) -> Callable:
    """
    Who sees whom in a packed sequence, as FlexAttention asks: a query sees the `prompt_length` keys before the
    sequence, the first `shared_length` positions, and in its own segment what is not behind it. Padding sees itself.
    """

    def visible(batch, head, query, key):
        # For a key in the prompt, row 0 of the sequence is looked up, and not used.
        place = torch.clamp(key - prompt_length, min=0)
        segment = segment_ids[batch, place]
        shared = (segment == 0) & (place < shared_length[batch, query])
        own = (segment == segment_ids[batch, query]) & (segment != 0) & (query >= place)
        return (key < prompt_length) | shared | own

    return visible


def packed_attention_mask(
    shared_length: torch.Tensor, segment_ids: torch.Tensor, prompt_length: int = 0
) -> torch.Tensor:
    """Which key (fourth axis) each query (third axis) sees, `(batch, 1, length, prompt_length + length)` in bool."""
    device, (batch, length) = segment_ids.device, segment_ids.shape
    users = torch.arange(batch, device=device)[:, None, None]
    queries = torch.arange(length, device=device)[:, None]
    keys = torch.arange(prompt_length + length, device=device)
    return _visibility(shared_length, segment_ids, prompt_length)(users, None, queries, keys)[:, None]


def packed_block_mask(shared_length: torch.Tensor, segment_ids: torch.Tensor, prompt_length: int = 0) -> BlockMask:
    """The same as [`packed_attention_mask`] for FlexAttention, which skips the blocks that nobody sees."""
    visible = _visibility(shared_length, segment_ids, prompt_length)
    batch, length = segment_ids.shape
    return create_block_mask(visible, batch, None, length, prompt_length + length, device=segment_ids.device)
