"""Histories as model inputs: all prefixes of a user in one sequence, or the whole history alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel


def pack_histories(
    histories: Sequence[np.ndarray | Sequence[int]],
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int],
    targets: Sequence[np.ndarray | Sequence[int]] | None = None,
    pad_to_multiple_of: int = 1,
    packed: bool = True,
) -> dict[str, torch.Tensor]:
    r"""
    Lays each user out as `prefix tokens | items 1..T | closing tokens ...`, padded on the right.

    Without `targets` the closing tokens follow the whole history once: the inference form. With `targets` (the item
    after each position) one copy of the closing tokens is added for every position t; it sees the prefix tokens, items
    1..t and itself, at the position ids that it would have if the user had only those items. The hidden states are
    those of one sequence a prefix, at a fraction of the cost (section 2.5 of the method). With no closing tokens the
    items themselves answer: the ordinary next-item objective.

    Args:
        histories (`list` of `batch` integer sequences): Item rows, oldest first, none empty.
        prefix_ids (`list[int]`): Prompt tokens before the items.
        suffix_ids (`list[int]`): Closing prompt tokens after the items; the last one's state represents the user.
        targets (`list` of `batch` integer sequences, *optional*): Row of the item that follows each position, as long
            as the history; -100 where nothing is to be predicted.
        pad_to_multiple_of (`int`, *optional*, defaults to `1`): Padded length is a multiple of this: fewer shapes mean
            fewer kernels to build and less memory in pieces.

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
            - **copy** (likewise): the copy a position belongs to, 0 for what all copies share, -1 for padding.
    """
    prefix, suffix = np.asarray(prefix_ids, dtype=np.int64), np.asarray(suffix_ids, dtype=np.int64)
    if targets is not None and len(suffix) and not packed:
        return _one_prefix_a_row(histories, targets, prefix_ids, suffix_ids, pad_to_multiple_of)
    rows = []
    for index, history in enumerate(histories):
        history = np.asarray(history, dtype=np.int64)
        head = len(prefix) + len(history)
        row = {
            "input_ids": np.concatenate([prefix, np.zeros(len(history), np.int64)]),
            "items": np.concatenate([np.zeros(len(prefix), np.int64), history]),
        }
        if targets is None:
            _append(row, input_ids=suffix, items=np.zeros_like(suffix))
            rows.append(row)
            continue
        following = np.asarray(targets[index], dtype=np.int64)
        row["labels"] = np.concatenate([np.full(len(prefix), -100), following])
        if len(suffix):
            positions = np.flatnonzero(following != -100)
            copies, seen = len(positions), len(prefix) + positions + 1
            row["labels"] = np.full(head + copies * len(suffix), -100)
            row["labels"][head + len(suffix) - 1 :: len(suffix)] = following[positions]
            row["shared_length"] = np.concatenate([np.arange(1, head + 1), np.repeat(seen, len(suffix))])
            row["copy"] = np.concatenate([np.zeros(head, np.int64), np.repeat(np.arange(1, copies + 1), len(suffix))])
            row["position_ids"] = np.concatenate([np.arange(head), (seen[:, None] + np.arange(len(suffix))).ravel()])
            _append(row, input_ids=np.tile(suffix, copies), items=np.zeros(copies * len(suffix), np.int64))
        rows.append(row)
    lengths = [len(row["input_ids"]) for row in rows]
    padded = -(-max(lengths) // pad_to_multiple_of) * pad_to_multiple_of
    batch = {}
    for name in rows[0]:
        values = np.full((len(rows), padded), {"labels": -100, "copy": -1}.get(name, 0), dtype=np.int64)
        for row, length, target_row in zip(rows, lengths, values, strict=True):
            target_row[:length] = row[name]
        batch[name] = torch.from_numpy(values)
    if targets is None:
        batch["lengths"] = torch.tensor(lengths)
    return batch


def _one_prefix_a_row(histories, targets, prefix_ids, suffix_ids, pad_to_multiple_of) -> dict[str, torch.Tensor]:
    """The training examples of [`pack_histories`] in its inference form, with the label where the prefix is read."""
    prefixes, answers = [], []
    for history, following in zip(histories, targets, strict=True):
        for position in np.flatnonzero(np.asarray(following) != -100):
            prefixes.append(history[: position + 1])
            answers.append(int(following[position]))
    batch = pack_histories(prefixes, prefix_ids, suffix_ids, pad_to_multiple_of=pad_to_multiple_of)
    batch["labels"] = torch.full_like(batch["items"], -100)
    batch["labels"][torch.arange(len(answers)), batch.pop("lengths") - 1] = torch.tensor(answers)
    return batch


def _append(row: dict[str, np.ndarray], **parts: np.ndarray) -> None:
    for name, part in parts.items():
        row[name] = np.concatenate([row[name], part])


def prepend_prompt(
    prefix_ids: Sequence[int],
    input_ids: torch.Tensor,
    items: torch.Tensor,
    labels: torch.Tensor | None,
    lengths: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shared_length: torch.Tensor | None,
    copy: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """What [`pack_histories`] returned without `prefix_ids`, as it returns it with them."""
    prefix = torch.tensor(prefix_ids, device=items.device)
    count = len(prefix)

    def joined(front: torch.Tensor, tensor: torch.Tensor | None, shift: int = 0) -> torch.Tensor | None:
        return None if tensor is None else torch.cat([front.expand(len(items), count), tensor + shift], dim=1)

    positions = torch.arange(count, device=items.device)
    return (
        joined(prefix, input_ids),
        joined(torch.zeros_like(prefix), items),
        joined(torch.full_like(prefix, -100), labels),
        None if lengths is None else lengths + count,
        joined(positions, position_ids, count),
        joined(positions + 1, shared_length, count),
        joined(torch.zeros_like(prefix), copy),
    )


def packed_attention_mask(shared_length: torch.Tensor, copy: torch.Tensor, prompt_length: int = 0) -> torch.Tensor:
    """
    Who sees whom in a packed sequence: a query sees the first `shared_length` positions, and in its own copy what is
    not behind it.

    Args:
        shared_length (`torch.LongTensor` of shape `(batch, length)`): As returned by [`pack_histories`].
        copy (`torch.LongTensor` of shape `(batch, length)`): As returned by [`pack_histories`].
        prompt_length (`int`, *optional*, defaults to `0`): Keys before the sequence, which every query sees.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, length, prompt_length + length)`, true where a query (third axis) sees
        a key (fourth axis). Padding sees itself, so that no row is empty.
    """
    index = torch.arange(copy.shape[1], device=copy.device)
    behind = index[None, :, None] >= index[None, None, :]
    shared = (copy[:, None, :] == 0) & (index[None, None, :] < shared_length[:, :, None])
    own = (copy[:, :, None] == copy[:, None, :]) & (copy[:, :, None] != 0) & behind
    return nn.functional.pad(shared | own, (prompt_length, 0), value=True)[:, None]


def packed_block_mask(shared_length: torch.Tensor, copy: torch.Tensor, prompt_length: int = 0) -> BlockMask:
    """The same as [`packed_attention_mask`] for FlexAttention, which skips the blocks that nobody sees."""

    def visible(batch, head, query, key):
        # Of a key in the prompt the place behind it is looked up, and not used.
        place = torch.clamp(key - prompt_length, min=0)
        shared = (copy[batch, place] == 0) & (place < shared_length[batch, query])
        own = (copy[batch, query] == copy[batch, place]) & (copy[batch, query] != 0) & (query >= place)
        return (key < prompt_length) | shared | own

    batch, length = copy.shape
    return create_block_mask(visible, batch, None, length, prompt_length + length, device=copy.device)


def should_try_flex_attention(device_type: str, supported: bool, attn_implementation: str) -> bool:
    """
    Whether FlexAttention may be worth its compilation for packed sequences: on CUDA, where it has kernels that skip
    blocks and a backward pass, in place of SDPA.

    Args:
        device_type (`str`): Type of the device that the backbone is on.
        supported (`bool`): Whether the backbone's family takes it (`_supports_flex_attn`).
        attn_implementation (`str`): What the backbone attends with now; eager and flash attention somebody chose.
    """
    return device_type == "cuda" and supported and attn_implementation == "sdpa"


@contextmanager
def use_attention(backbone: PreTrainedModel, attn_implementation: str) -> Iterator[None]:
    """Lets the backbone attend with `attn_implementation`, named as for `from_pretrained`; afterwards as before."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(attn_implementation)
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)
