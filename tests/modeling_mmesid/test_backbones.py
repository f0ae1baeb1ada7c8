"""Every family of decoders that `AutoModel` may bring: packed prefixes mean the same there as one prefix a row."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AutoModel,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation
from modeling_mmesid.packing import (
    pack_histories,
    packed_attention_mask,
    packed_block_mask,
    should_try_flex_attention,
    use_attention,
)

from .conftest import NUM_ITEMS


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    # Windows as long as prompt and history may be, but shorter than the prefixes of a user together.
    "mistral": MistralConfig(**SIZES, sliding_window=25),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=25),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=25),
    "smollm3": SmolLM3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0, embd_pdrop=0),
}
PREFIX = [5, 6, 9]


def model_of(backbone_config, **kwargs) -> MMESIDForSequentialRecommendation:
    set_seed(0)
    config = MMESIDConfig(
        backbone_config=backbone_config,
        num_items=NUM_ITEMS,
        max_history=20,
        prompt_prefix_ids=PREFIX,
        prompt_suffix_ids=[7, 8],
        item_token_scale=4.0,
        **kwargs,
    )
    model = MMESIDForSequentialRecommendation(config)
    model.initialize_items(torch.arange(NUM_ITEMS + 1))
    return model.eval()


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request) -> MMESIDForSequentialRecommendation:
    return model_of(FAMILIES[request.param])


@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    prefix=st.lists(st.integers(1, 63), min_size=0, max_size=4),
    suffix=st.lists(st.integers(1, 63), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_packed_states_and_gradients_are_those_of_one_prefix_a_row(model, lengths, prefix, suffix, seed):
    random = np.random.default_rng(seed)
    sequences = [random.integers(1, NUM_ITEMS + 1, size=length) for length in lengths]
    histories, targets = [s[:-1] for s in sequences], [s[1:] for s in sequences]
    results = []
    for inputs in (
        pack_histories(histories, prefix, suffix, targets, packed=False),
        pack_histories(histories, prefix, suffix, targets),
        pack_histories(histories, (), suffix, targets) | {"shared_prompt": True},
        pack_histories(histories, (), suffix, targets, packed=False) | {"shared_prompt": True},
    ):
        model.zero_grad()
        with patch.object(model.config, "prompt_prefix_ids", prefix):
            output = model(**inputs)
        output.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((output, gradients))
    (rows, row_gradients), *others = results
    assert len(rows.user_embeddings) == sum(lengths) - len(lengths)
    for output, gradients in others:
        torch.testing.assert_close(output.user_embeddings, rows.user_embeddings, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.loss, rows.loss, rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            scale = row_gradients[name].abs().max().clamp(min=1.0)
            torch.testing.assert_close(gradient / scale, row_gradients[name] / scale, rtol=0, atol=1e-5, msg=name)


def test_padding_on_the_right_changes_nobody(model):
    together = model.encode_histories([[3, 9, 1, 22], [5], [40, 2, 7, 7, 8, 11]])
    alone = torch.cat([model.encode_histories([history]) for history in ([3, 9, 1, 22], [5], [40, 2, 7, 7, 8, 11])])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_every_family_here_supports_packing(model):
    assert model.packing_problem() is None


def test_attention_that_cannot_take_the_mask_is_found_out():
    # ALiBi counts positions from the mask, and takes no position ids.
    bloom = model_of(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2))
    assert "position_ids" in bloom.packing_problem()
    window = model_of(MistralConfig(**SIZES, sliding_window=8))
    assert "sliding window of 8" in window.packing_problem()
    # The fallback serves them: one prefix a row, in one call, is what each prefix gives alone.
    batch = pack_histories([[3, 9, 1]], PREFIX, [7, 8], [[9, 1, 5]], packed=False)
    states = bloom(**batch).user_embeddings
    alone = torch.cat([bloom.encode_histories([history]) for history in ([3], [3, 9], [3, 9, 1])])
    torch.testing.assert_close(states, alone, rtol=0, atol=1e-5)


def test_a_backbone_that_ignores_the_mask_is_found_out():
    model = model_of(FAMILIES["llama"])
    forward = model.backbone.forward

    def deaf(*args, attention_mask=None, position_ids=None, **kwargs):
        return forward(*args, position_ids=position_ids, **kwargs)

    model.backbone.forward = deaf
    assert "differ" in model.packing_problem()


@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention", "deaf"])
def test_another_attention_is_tried_before_it_reads(attn_implementation):
    def deaf(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("deaf", deaf)
    model = model_of(FAMILIES["qwen2"], token_dropout=0.5).train()
    random_state = torch.get_rng_state()
    # Uncompiled, and so at once.
    with torch.compiler.set_stance("force_eager"):
        problem = model.attention_problem(attn_implementation)
    if attn_implementation == "eager":
        assert problem is None
    elif attn_implementation == "deaf":
        assert problem.startswith("its states differ by ")
    else:
        # So on every CPU, and as good a failure as a kernel that does not compile.
        assert "FlexAttention does not support backward on CPU" in problem
    assert model.backbone.config._attn_implementation == "sdpa" and model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_on_attention_weights_speaks_against_flex_attention():
    model = model_of(LlamaConfig(**SIZES, attention_dropout=0.1))
    with torch.compiler.set_stance("force_eager"):
        assert "dropout" in model.attention_problem("flex_attention")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_where_flex_attention_is_tried(name):
    supported = AutoModel.from_config(FAMILIES[name])._supports_flex_attn
    assert supported or name == "gpt2"
    assert should_try_flex_attention("cuda", supported, "sdpa") == supported
    for device_type, attn_implementation in (("cpu", "sdpa"), ("cuda", "eager"), ("cuda", "flash_attention_2")):
        assert not should_try_flex_attention(device_type, supported, attn_implementation)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_reads_packed_prefixes_as_sdpa_does(model):
    """Forward alone, and uncompiled: all that a CPU can do."""
    if not model.backbone._supports_flex_attn:
        pytest.skip("transformers offers no FlexAttention for it")
    histories = [[3, 9, 1, 22, 17, 30], [5], [40, 2, 7]]
    inputs = pack_histories(histories, (), [7, 8], [[9, 1, 22, 4, -100, 2], [6], [2, 7, 7]]) | {"shared_prompt": True}
    expected = model(**inputs).user_embeddings
    model.requires_grad_(False)
    try:
        with torch.compiler.set_stance("force_eager"), use_attention(model.backbone, "flex_attention"):
            torch.testing.assert_close(model(**inputs).user_embeddings, expected, rtol=0, atol=1e-5)
    finally:
        model.requires_grad_(True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_on_cuda_passes_its_trial(dtype):
    config = LlamaConfig(**SIZES | {"hidden_size": 128, "max_position_embeddings": 512})
    model = model_of(config).cuda()
    model.backbone.to(dtype)
    assert model.attention_problem("flex_attention") is None


def test_pretrained_backbones_of_every_family_load_by_name(tmp_path):
    for name in FAMILIES:
        AutoModel.from_config(FAMILIES[name]).save_pretrained(tmp_path / name)
        model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
            tmp_path / name, num_items=NUM_ITEMS, prompt_suffix_ids=[7], lora={"r": 2, "target_modules": "all-linear"}
        )
        model.initialize_items(torch.arange(NUM_ITEMS + 1))
        model(**pack_histories([[3, 9]], [], [7], [[9, 1]])).loss.backward()
        learning = [parameter.grad for key, parameter in model.named_parameters() if "lora_B" in key]
        assert learning and all(gradient.abs().sum() > 0 for gradient in learning)
        model.save_pretrained(tmp_path / f"{name}_tuned")
        loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / f"{name}_tuned")
        expected = model.eval().recommend([[3, 9]]).scores
        assert torch.equal(loaded.recommend([[3, 9]]).scores, expected)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.5)
        expected = model.recommend([[3, 9]]).scores
        model.save_pretrained(tmp_path / f"{name}_merged", merge_backbone=True)
        merged = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / f"{name}_merged")
        torch.testing.assert_close(merged.recommend([[3, 9]]).scores, expected, rtol=0, atol=1e-5)


def test_users_read_behind_the_kept_prompt_are_the_same(model):
    histories = [[3, 9, 1, 22], [5], [40, 2, 7, 7, 8, 11]]
    inputs = pack_histories(histories, PREFIX, [7, 8])
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                model.encode_histories(histories), model(**inputs).user_embeddings, rtol=0, atol=1e-5
            )
        before = model.encode_histories(histories)
        parameter = next(model.backbone.parameters())
        parameter.mul_(1.5)
        assert not torch.allclose(model.encode_histories(histories), before)
        torch.testing.assert_close(
            model.encode_histories(histories), model(**inputs).user_embeddings, rtol=0, atol=1e-5
        )
        parameter.div_(1.5)


@pytest.mark.parametrize("prompt_length", [0, 3])
def test_block_mask_for_flex_attention_is_the_same_mask(prompt_length):
    batch = pack_histories([[3, 9, 1, 22], [5]], PREFIX, [7, 8], [[9, 1, 22, 4], [6]], pad_to_multiple_of=32)
    expected = packed_attention_mask(batch["shared_length"], batch["copy"], prompt_length)
    block_mask = packed_block_mask(batch["shared_length"], batch["copy"], prompt_length)
    dense = torch.zeros_like(expected)
    for user in range(2):
        for query in range(dense.shape[2]):
            for key in range(dense.shape[3]):
                dense[user, 0, query, key] = block_mask.mask_mod(*map(torch.tensor, (user, 0, query, key)))
    assert torch.equal(dense, expected)


def test_recomputed_layers_read_the_prompt_with_every_user():
    model = model_of(FAMILIES["llama"])
    inputs = pack_histories([[3, 9, 1], [5]], (), [7, 8], [[9, 1, 5], [6]]) | {"shared_prompt": True}
    expected = model(**inputs).loss
    model.activation_checkpointing_enable()
    model.train()
    torch.testing.assert_close(model(**inputs).loss, expected, rtol=0, atol=1e-5)
