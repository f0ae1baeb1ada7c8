"""Small decoders of the families that `AutoModel` may bring, and recommenders around them."""

import torch
from transformers import (
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

from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation

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
    own_settings = {
        "num_items": NUM_ITEMS,
        "max_history": 20,
        "prompt_prefix_ids": PREFIX,
        "prompt_suffix_ids": [7, 8],
        "item_token_scale": 4.0,
        "token_dropout": 0.0,
        "output_dropout": 0.0,
    }
    config = MMESIDConfig(backbone_config=backbone_config, **own_settings | kwargs)
    model = MMESIDForSequentialRecommendation(config)
    model.initialize_items(torch.arange(NUM_ITEMS + 1))
    return model.eval()
