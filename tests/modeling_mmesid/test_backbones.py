"""For each family of decoders that `AutoModel` may bring, packed prefixes mean the same as one prefix per row."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModel

from modeling_mmesid import MMESIDForSequentialRecommendation
from modeling_mmesid.packing import pack_histories, packed_attention_mask, packed_block_mask

from .backbones import FAMILIES, model_of
from .conftest import HISTORIES, NUM_ITEMS, new_model


def loss_of_single_prefixes(model, sequences, prefix, suffix):
    """Loss and users `(prefixes, hidden)` by the definition: the backbone reads prompt, items and closing tokens of
    each prefix alone, and every item is scored."""
    words, table, users, targets = model.model.backbone.get_input_embeddings(), model.item_table(), [], []
    for sequence in sequences:
        for end in range(1, len(sequence)):
            items = table[torch.as_tensor(sequence[:end])] * model.config.item_token_scale
            prompt, closing = (words(torch.tensor(ids, dtype=torch.long)) for ids in (prefix, suffix))
            states = model.model.backbone(inputs_embeds=torch.cat([prompt, items, closing])[None]).last_hidden_state
            users.append(states[0, -1] * model.model.user_head.log_scale.exp())
            targets.append(sequence[end] - 1)
    users = torch.stack(users)
    return torch.nn.functional.cross_entropy(users @ table[1:].T, torch.tensor(targets)), users


@pytest.fixture(scope="module", params=[*FAMILIES, "modalities"])
def model(request) -> MMESIDForSequentialRecommendation:
    return new_model() if request.param == "modalities" else model_of(FAMILIES[request.param])


@settings(max_examples=4)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    prefix=st.lists(st.integers(1, 63), min_size=0, max_size=4),
    suffix=st.lists(st.integers(1, 63), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
@example(lengths=[2, 9, 5], prefix=[5, 6], suffix=[], seed=0)
def test_packed_states_and_gradients_are_those_of_one_prefix_per_row(model, lengths, prefix, suffix, seed):
    random = np.random.default_rng(seed)
    sequences = [random.integers(1, NUM_ITEMS + 1, size=length) for length in lengths]
    histories, targets = [s[:-1] for s in sequences], [s[1:] for s in sequences]
    results = []
    with patch.object(model.config, "prompt_prefix_ids", prefix):
        for compute in (
            lambda: loss_of_single_prefixes(model, sequences, prefix, suffix),
            lambda: model(**pack_histories(histories, suffix, targets))[:2],
            lambda: model(**pack_histories(histories, suffix, targets, packed=False))[:2],
        ):
            model.zero_grad()
            loss, users = compute()
            loss.backward()
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            results.append((loss, users, gradients))
    (loss, users, expected), *others = results
    assert len(users) == sum(lengths) - len(lengths)
    for other_loss, other_users, gradients in others:
        torch.testing.assert_close(other_users, users, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            scale = expected[name].abs().max().clamp(min=1.0)
            torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-5, msg=name)


def test_padding_on_the_right_changes_nobody(model):
    together = model.encode_histories(HISTORIES)
    alone = torch.cat([model.encode_histories([history]) for history in HISTORIES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_pretrained_backbones_of_every_family_load_by_name(tmp_path):
    for name in FAMILIES:
        AutoModel.from_config(FAMILIES[name]).save_pretrained(tmp_path / name)
        model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
            tmp_path / name, num_items=NUM_ITEMS, prompt_suffix_ids=[7], lora={"r": 2, "target_modules": "all-linear"}
        )
        model.initialize_items(torch.arange(NUM_ITEMS + 1))
        model(**pack_histories([[3, 9]], [7], [[9, 1]])).loss.backward()
        learning = [parameter.grad for key, parameter in model.named_parameters() if "lora_B" in key]
        assert learning and all(gradient.abs().sum() > 0 for gradient in learning)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.5)
        expected = model.eval().recommend([[3, 9]]).scores
        model.save_pretrained(tmp_path / f"{name}_tuned")
        loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / f"{name}_tuned")
        assert torch.equal(loaded.recommend([[3, 9]]).scores, expected)
        model.save_pretrained(tmp_path / f"{name}_merged", merge_backbone=True)
        merged = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / f"{name}_merged")
        torch.testing.assert_close(merged.recommend([[3, 9]]).scores, expected, rtol=0, atol=1e-5)


def test_the_kept_prompt_is_read_again_after_the_backbone_has_changed(model):
    sequences = [[3, 9, 1, 22], [40, 2, 7, 7, 8, 11]]
    parameter = next(model.model.backbone.parameters())
    with torch.no_grad():
        for factor in (1.0, 1.5, 1 / 1.5):
            parameter.mul_(factor)
            for _ in range(2):
                users = model.encode_histories([sequence[:-1] for sequence in sequences])
                _, expected = loss_of_single_prefixes(model, sequences, model.config.prompt_prefix_ids, [7, 8])
                torch.testing.assert_close(users, expected[[2, 7]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt_length", [0, 3])
def test_block_mask_for_flex_attention_is_the_same_mask(prompt_length):
    batch = pack_histories([[3, 9, 1, 22], [5]], [7, 8], [[9, 1, 22, 4], [6]], pad_to_multiple_of=32)
    expected = packed_attention_mask(batch["shared_length"], batch["segment_ids"], prompt_length)
    block_mask = packed_block_mask(batch["shared_length"], batch["segment_ids"], prompt_length)
    assert block_mask.shape == expected.shape
    assert torch.equal(create_mask(block_mask.mask_mod, *expected.shape, device="cpu"), expected)
