"""Trials of a backbone's attention before training: whether packed prefixes mean what single ones mean."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_mmesid import MMESIDModel
from modeling_mmesid.packing import pack_histories
from modeling_mmesid.recommendation import evaluating


@contextmanager
def use_attention(backbone: PreTrainedModel, attn_implementation: str) -> Iterator[None]:
    """Lets the backbone attend with `attn_implementation`, named as for `from_pretrained`; afterwards as before."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(attn_implementation)
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


def should_try_flex_attention(model: MMESIDModel) -> bool:
    """Whether FlexAttention may be worth its compilation for packed sequences: on CUDA, where it has kernels that skip
    blocks and a backward pass, in place of SDPA. Eager and flash attention are somebody's choice."""
    backbone = model.backbone
    return (
        model.device.type == "cuda" and backbone._supports_flex_attn and backbone.config._attn_implementation == "sdpa"
    )


def packing_problem(model: MMESIDModel) -> str | None:
    """Why the prefixes of a user cannot share a sequence on the model's backbone, or `None` if they can. What its
    attention makes of the mask is not read off its name but tried, on one short history."""
    config, text_config = model.config, model.config.get_text_config()
    longest = len(config.prompt_prefix_ids) + config.max_history + len(config.prompt_suffix_ids)
    window = getattr(text_config, "sliding_window", None)
    if window is not None and window < longest:
        return f"its sliding window of {window} positions is shorter than prompt and history ({longest})"
    if "position_ids" not in inspect.signature(model.backbone.forward).parameters:
        return "it takes no position_ids"
    with evaluating(model):
        difference = _difference(model, _trial(model, [3], packed=True), _trial(model, [3], packed=False))
    return None if difference is None else f"{difference} between packed and single prefixes"


def attention_problem(model: MMESIDModel, attn_implementation: str) -> str | None:
    """Why another attention, such as `"flex_attention"`, cannot stand in for the backbone's own in training on packed
    prefixes, or `None` if it can: on two batches of unlike shape, the first as long as a history may be, it must run
    (and compile) forward and backward and give the same states and gradients."""
    was_training, devices = model.training, [model.device] if model.device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(devices):
            for lengths in ([model.config.max_history, 2], [3, 2, 1]):
                trials = []
                for name in (attn_implementation, model.backbone.config._attn_implementation):
                    # The same dropout.
                    torch.manual_seed(0)
                    with use_attention(model.backbone, name):
                        trials.append(_trial(model, lengths, packed=True))
                difference = _difference(model, *trials)
                if difference is not None:
                    return difference
    except Exception as error:  # What does not compile may raise anything.
        reason = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {reason}"
    finally:
        model.train(was_training)
    return None


def _trial(model: MMESIDModel, lengths: Sequence[int], packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backbone makes of a batch of users with so many items: the states at the end of each prefix, `(sum of
    lengths, hidden)`, and the gradient that they send to the items, `(longest, hidden)`."""
    histories = [list(range(1, length + 1)) for length in lengths]
    inputs = pack_histories(histories, model.config.prompt_suffix_ids or [0], histories, packed=packed)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    labels = inputs.pop("labels")
    # Vectors as the backbone knows them, from all over the vocabulary but for its ends, where special tokens are.
    last_word = model.config.get_text_config().vocab_size - 1
    words = torch.linspace(0, last_word, max(lengths) + 2, device=model.device)[1:-1].long()
    with torch.enable_grad():
        vectors = model.backbone.get_input_embeddings()(words).detach() / model.config.item_token_scale
        vectors.requires_grad_()
        item_tokens = nn.functional.embedding((inputs["items"] - 1).clamp(min=0), vectors)
        states = model(**inputs, item_tokens=item_tokens).last_hidden_state[labels != -100]
        # Half the dimensions are summed: over all of them a normalised state sums to a constant.
        (gradient,) = torch.autograd.grad(states[:, ::2].sum(), vectors)
    return states.detach().float(), gradient.float()


def _difference(model: MMESIDModel, found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> str | None:
    """What of two trials differs by more than rounding, or `None` if nothing does."""
    full = model.backbone.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    # A wrong mask changes a state by tens of per cent, TF32 by a tenth of one, half precision by one or two.
    tolerance = 0.01 if full else 0.1
    for name, one, other in zip(("states", "gradients"), found, expected, strict=True):
        # The worst row, so that one wrong prefix among many is not averaged away.
        difference = (one - other).norm(dim=-1).max() / other.norm(dim=-1).mean()
        if not difference < tolerance:
            return f"its {name} differ by {difference:.1%}"
    return None
