"""Histories as model inputs: all prefixes of a user in one sequence, or the whole history alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


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

    Args:
        histories (`list` of `batch` integer sequences): Item rows, oldest first, none empty.
        suffix_ids (`list[int]`): Closing prompt tokens after the items; the last one's state represents the user.
        targets (`list` of `batch` integer sequences, *optional*): Row of the item that follows each position, as long
            as the history; -100 where nothing is to be predicted.
        pad_to_multiple_of (`int`, *optional*, defaults to `1`): Padded length is a multiple of this: fewer shapes mean
            fewer kernels to build and less memory in pieces.
        packed (`bool`, *optional*, defaults to `True`): `False` gives each prefix with a target a row of its own, for
            backbones whose attention cannot take the mask of packed sequences.

    Returns:
        `dict[str, torch.Tensor]`, of shape `(batch, length)` where nothing else is said:
            - **input_ids**: tokens, 0 where an item or padding stands.
            - **items**: item rows, 0 where a token or padding stands.
            - **lengths** (of shape `(batch,)`, without `targets`): positions of each sequence; the user is read at the
              last of them.
            - **labels** (with `targets`): target row where a user is read, -100 elsewhere.
            - **position_ids** (with `targets` and closing tokens): positions as the backbone sees them; otherwise they
              just count.
            - **shared_length** (likewise): how many leading positions each position sees.
            - **segment_ids** (likewise): the copy of the closing tokens that a position belongs to, 0 for the items,
              which all copies share, -1 for padding.
    """
    suffix = np.asarray(suffix_ids, dtype=np.int64)
    if targets is not None and len(suffix) and not packed:
        return _one_prefix_per_row(histories, targets, suffix_ids, pad_to_multiple_of)
    rows = []
    for index, history in enumerate(histories):
        history = np.asarray(history, dtype=np.int64)
        length = len(history)
        row = {"input_ids": np.zeros(length, np.int64), "items": history}
        if targets is None:
            _append(row, input_ids=suffix, items=np.zeros_like(suffix))
            rows.append(row)
            continue
        following = np.asarray(targets[index], dtype=np.int64)
        row["labels"] = following
        if len(suffix):
            positions = np.flatnonzero(following != -100)
            copies, seen = len(positions), positions + 1
            row["labels"] = np.full(length + copies * len(suffix), -100)
            row["labels"][length + len(suffix) - 1 :: len(suffix)] = following[positions]
            row["shared_length"] = np.concatenate([np.arange(1, length + 1), np.repeat(seen, len(suffix))])
            row["segment_ids"] = np.repeat(np.arange(copies + 1), [length] + copies * [len(suffix)])
            row["position_ids"] = np.concatenate([np.arange(length), (seen[:, None] + np.arange(len(suffix))).ravel()])
            _append(row, input_ids=np.tile(suffix, copies), items=np.zeros(copies * len(suffix), np.int64))
        rows.append(row)
    lengths = [len(row["input_ids"]) for row in rows]
    padded = -(-max(lengths) // pad_to_multiple_of) * pad_to_multiple_of
    batch = {}
    for name in rows[0]:
        values = np.full((len(rows), padded), {"labels": -100, "segment_ids": -1}.get(name, 0), dtype=np.int64)
        for row, length, target_row in zip(rows, lengths, values, strict=True):
            target_row[:length] = row[name]
        batch[name] = torch.from_numpy(values)
    if targets is None:
        batch["lengths"] = torch.tensor(lengths)
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


def _append(row: dict[str, np.ndarray], **parts: np.ndarray) -> None:
    for name, part in parts.items():
        row[name] = np.concatenate([row[name], part])


def prepend_prompt(
    count: int,
    position_ids: torch.Tensor | None,
    shared_length: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What [`pack_histories`] says of a packed sequence (`None` of any other), with `count` prompt tokens in front."""
    if segment_ids is None:
        return None, None, None
    prompt = torch.arange(count, device=segment_ids.device).expand(len(segment_ids), count)
    return (
        torch.cat([prompt, position_ids + count], dim=1),
        torch.cat([prompt + 1, shared_length + count], dim=1),
        torch.cat([torch.zeros_like(prompt), segment_ids], dim=1),
    )


def packed_attention_mask(
    shared_length: torch.Tensor, segment_ids: torch.Tensor, prompt_length: int = 0
) -> torch.Tensor:
    """
    Who sees whom in a packed sequence, `(batch, 1, length, prompt_length + length)` in bool: a query (third axis) sees
    the `prompt_length` keys before the sequence, the first `shared_length` positions, and in its own segment what is
    not behind it. Padding sees itself, so that no row is empty.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    behind = index[None, :, None] >= index[None, None, :]
    shared = (segment_ids[:, None, :] == 0) & (index[None, None, :] < shared_length[:, :, None])
    own = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0) & behind
    return nn.functional.pad(shared | own, (prompt_length, 0), value=True)[:, None]


def packed_block_mask(shared_length: torch.Tensor, segment_ids: torch.Tensor, prompt_length: int = 0) -> BlockMask:
    """The same as [`packed_attention_mask`] for FlexAttention, which skips the blocks that nobody sees."""

    def visible(batch, head, query, key):
        # For a key in the prompt, row 0 of the sequence is looked up, and not used.
        place = torch.clamp(key - prompt_length, min=0)
        shared = (segment_ids[batch, place] == 0) & (place < shared_length[batch, query])
        own = (
            (segment_ids[batch, query] == segment_ids[batch, place])
            & (segment_ids[batch, query] != 0)
            & (query >= place)
        )
        return (key < prompt_length) | shared | own

    batch, length = segment_ids.shape
    return create_block_mask(visible, batch, None, length, prompt_length + length, device=segment_ids.device)
