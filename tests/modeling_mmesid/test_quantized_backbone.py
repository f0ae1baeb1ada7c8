"""QLoRA: an adapter on a backbone whose weights have four bits, on the CPU."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaModel, set_seed

from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation
from modeling_mmesid.packing import pack_histories

from .conftest import item_tables, llama_config, settings


pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes; pip install 'mmesid[qlora]'")

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
HISTORIES = [[1, 2, 3], [9], [30, 31]]


@pytest.fixture(scope="module")
def quantization():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def model(quantization, tmp_path_factory):
    set_seed(1)
    base = tmp_path_factory.mktemp("base") / "llama"
    LlamaModel(llama_config(hidden_size=64, intermediate_size=128)).save_pretrained(base)
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        base, lora=LORA, backbone_kwargs={"quantization_config": quantization}, **settings()
    )
    model.initialize_items(**item_tables())
    return model


def test_the_start_is_that_of_every_decoder(model):
    words = model.model.backbone.get_input_embeddings().weight.norm(dim=-1).mean()
    tokens = model.model.items.tokens(torch.arange(1, 41)).norm(dim=-1).mean()
    torch.testing.assert_close(tokens * model.config.item_token_scale, words, rtol=1e-3, atol=0)
    loss = model.eval()(**pack_histories([[1, 2, 3], [4, 5]], [7, 8], [[2, 3, 4], [5, 6]])).loss
    assert loss.item() == pytest.approx(math.log(40), abs=0.1)


def test_training_moves_the_adapter_and_nothing_else_of_the_backbone(model):
    assert model.model.backbone.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    before = {name: tensor.clone() for name, tensor in model.model.backbone.state_dict().items()}
    batch = pack_histories([[1, 2, 3], [4, 5]], [7, 8], [[2, 3, 4], [5, 6]])
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {
        name for name, tensor in model.model.backbone.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {name for name in before if "lora_" in name}


def test_gradients_are_the_same_before_and_after_an_evaluation(model):
    batch = pack_histories([[1, 2, 3], [4, 5]], [7, 8], [[2, 3, 4], [5, 6]])
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
        model.eval().recommend(HISTORIES)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_checkpoint_holds_the_adapter_and_recommends_the_same(model, quantization, tmp_path):
    model.eval().save_pretrained(tmp_path)
    assert all(
        "lora_" in name for name in load_file(tmp_path / "model.safetensors") if name.startswith("model.backbone.")
    )
    reloaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path, quantization_config=quantization)
    assert reloaded.model.backbone.layers[1].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    expected, found = model.recommend(HISTORIES), reloaded.recommend(HISTORIES)
    assert torch.equal(found.items, expected.items)
    torch.testing.assert_close(found.scores, expected.scores)


def test_of_a_checkpoint_without_base_model_the_backbone_alone_is_quantized(quantization, tmp_path):
    set_seed(1)
    config = MMESIDConfig(backbone_config=llama_config(hidden_size=64, intermediate_size=128), **settings())
    exact = MMESIDForSequentialRecommendation(config).eval()
    exact.initialize_items(**item_tables())
    exact.save_pretrained(tmp_path)
    quantized = MMESIDForSequentialRecommendation.from_pretrained(tmp_path, quantization_config=quantization)
    assert quantized.model.backbone.layers[1].mlp.up_proj.weight.dtype == torch.uint8
    for name, tensor in exact.model.items.state_dict().items():
        assert torch.equal(quantized.model.items.state_dict()[name], tensor), name
    given, expected = quantized.encode_histories(HISTORIES), exact.encode_histories(HISTORIES)
    assert torch.nn.functional.cosine_similarity(given, expected).min() > 0.95
    assert quantized.recommend(HISTORIES).items.shape == (3, 10)


def test_full_precision_base_loads_too(model, tmp_path):
    """The adapter is in full precision and the base model is fetched by name: four bits are a choice at load time."""
    model.eval().save_pretrained(tmp_path)
    full = MMESIDForSequentialRecommendation.from_pretrained(tmp_path)
    assert full.model.backbone.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.float32
    quantized, exact = model.encode_histories(HISTORIES), full.encode_histories(HISTORIES)
    assert torch.nn.functional.cosine_similarity(quantized, exact).min() > 0.95
    assert not torch.equal(quantized, exact)
