"""What is found out about a backbone's attention before training."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoModel, BloomConfig, LlamaConfig, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmesid.trainer.recommender.attention_trial import (
    attention_problem,
    packing_problem,
    should_try_flex_attention,
    use_attention,
)
from modeling_mmesid import MMESIDForSequentialRecommendation
from modeling_mmesid.packing import pack_histories

from ...modeling_mmesid.backbones import FAMILIES, SIZES, model_of


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request) -> MMESIDForSequentialRecommendation:
    return model_of(FAMILIES[request.param])


def test_every_family_here_supports_packing(model):
    assert packing_problem(model.model) is None


def test_attention_that_cannot_take_the_mask_is_found_out():
    # ALiBi counts positions from the mask, and takes no position ids.
    bloom = model_of(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2))
    assert "position_ids" in packing_problem(bloom.model)
    window = model_of(MistralConfig(**SIZES, sliding_window=8))
    assert "sliding window of 8" in packing_problem(window.model)
    # The fallback serves them: one prefix per row, in one call, is what each prefix gives alone.
    batch = pack_histories([[3, 9, 1]], [7, 8], [[9, 1, 5]], packed=False)
    states = bloom(**batch).user_embeddings
    alone = torch.cat([bloom.encode_histories([history]) for history in ([3], [3, 9], [3, 9, 1])])
    torch.testing.assert_close(states, alone, rtol=0, atol=1e-5)


def test_a_backbone_that_ignores_the_mask_is_found_out():
    model = model_of(FAMILIES["llama"])
    forward = model.model.backbone.forward

    def deaf(*args, attention_mask=None, position_ids=None, **kwargs):
        return forward(*args, position_ids=position_ids, **kwargs)

    model.model.backbone.forward = deaf
    assert "differ" in packing_problem(model.model)


@pytest.mark.parametrize(
    ("attn_implementation", "expected"),
    # The last so on every CPU, and as good a failure as a kernel that does not compile.
    [("eager", None), ("deaf", "states differ by "), ("flex_attention", "does not support backward on CPU")],
)
def test_another_attention_is_tried_before_it_reads(attn_implementation, expected):
    def deaf(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("deaf", deaf)
    model = model_of(FAMILIES["qwen2"], token_dropout=0.5).train()
    random_state = torch.get_rng_state()
    # Uncompiled, and so at once.
    with torch.compiler.set_stance("force_eager"):
        problem = attention_problem(model.model, attn_implementation)
    assert problem is None if expected is None else expected in problem
    assert model.model.backbone.config._attn_implementation == "sdpa" and model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_on_attention_weights_speaks_against_flex_attention():
    model = model_of(LlamaConfig(**SIZES, attention_dropout=0.1))
    with torch.compiler.set_stance("force_eager"):
        assert "dropout" in attention_problem(model.model, "flex_attention")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_where_flex_attention_is_tried(name):
    supported = AutoModel.from_config(FAMILIES[name])._supports_flex_attn
    assert supported or name == "gpt2"
    for device_type, attention in (("cuda", "sdpa"), ("cpu", "sdpa"), ("cuda", "eager")):
        config = SimpleNamespace(_attn_implementation=attention)
        backbone = SimpleNamespace(_supports_flex_attn=supported, config=config)
        model = SimpleNamespace(device=torch.device(device_type), backbone=backbone)
        assert should_try_flex_attention(model) == (supported and (device_type, attention) == ("cuda", "sdpa"))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_reads_packed_prefixes_as_sdpa_does(model):
    """Forward alone, and uncompiled: all that a CPU can do."""
    if not model.model.backbone._supports_flex_attn:
        pytest.skip("transformers offers no FlexAttention for it")
    histories = [[3, 9, 1, 22, 17, 30], [5], [40, 2, 7]]
    inputs = pack_histories(histories, [7, 8], [[9, 1, 22, 4, -100, 2], [6], [2, 7, 7]])
    expected = model(**inputs).user_embeddings
    model.requires_grad_(False)
    try:
        with torch.compiler.set_stance("force_eager"), use_attention(model.model.backbone, "flex_attention"):
            torch.testing.assert_close(model(**inputs).user_embeddings, expected, rtol=0, atol=1e-5)
    finally:
        model.requires_grad_(True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_on_cuda_passes_its_trial(dtype):
    config = LlamaConfig(**SIZES | {"hidden_size": 128, "max_position_embeddings": 512})
    model = model_of(config).cuda()
    model.model.backbone.to(dtype)
    assert attention_problem(model.model, "flex_attention") is None
