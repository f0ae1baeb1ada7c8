import pytest
import torch
from transformers import LlamaConfig, LlamaModel, set_seed

from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation


NUM_ITEMS = 40
HISTORIES = [[3, 9, 1, 22], [5], [40, 2, 7, 7, 8, 11]]


def llama_config(**kwargs) -> LlamaConfig:
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaConfig(**settings | {"max_position_embeddings": 64} | kwargs)


def item_tables(seed: int = 0, codebook_dim: int = 16) -> dict:
    """What `initialize_items` takes, for two modalities; items 3 and 4 lack the second, item 5 lacks both."""
    generator = torch.Generator().manual_seed(seed)
    present = {name: torch.ones(NUM_ITEMS + 1, dtype=torch.bool) for name in ("collaborative", "text")}
    present["text"][[0, 3, 4, 5]] = False
    present["collaborative"][[0, 5]] = False
    widths = {"collaborative": 8, "text": 12}
    return {
        "frequencies": torch.arange(NUM_ITEMS + 1),
        "embeddings": {
            name: torch.randn(NUM_ITEMS + 1, width, generator=generator) * present[name][:, None]
            for name, width in widths.items()
        },
        "present": present,
        "codes": {name: torch.randint(0, 6, (NUM_ITEMS + 1, 3), generator=generator) for name in widths},
        "code_vectors": {name: torch.randn(3, 6, codebook_dim, generator=generator) for name in widths},
    }


def settings(**kwargs) -> dict:
    return {
        "num_items": NUM_ITEMS,
        "modalities": ["collaborative", "text"],
        "embedding_dims": [8, 12],
        "num_quantizers": 3,
        "codebook_size": 6,
        "codebook_dim": 16,
        "prompt_prefix_ids": [5, 6],
        "prompt_suffix_ids": [7, 8],
        "max_history": 20,
        "token_dropout": 0.0,
        "output_dropout": 0.0,
        **kwargs,
    }


def new_model(**kwargs) -> MMESIDForSequentialRecommendation:
    set_seed(0)
    config = MMESIDConfig(backbone_config=llama_config(), **settings(**kwargs))
    model = MMESIDForSequentialRecommendation(config)
    tables = item_tables(codebook_dim=config.codebook_dim)
    if not config.modalities:
        tables = {"frequencies": tables["frequencies"]}
    elif not config.num_quantizers:
        tables = {name: tables[name] for name in ("frequencies", "embeddings", "present")}
    model.initialize_items(**tables)
    # Fusion starts uniform: make it something that tests can tell from uniform.
    torch.nn.init.normal_(model.model.items.fusion.output.weight)
    return model.eval()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> str:
    """A small Llama on disk, as a pretrained base model."""
    set_seed(1)
    path = tmp_path_factory.mktemp("base") / "llama"
    LlamaModel(llama_config()).save_pretrained(path)
    return str(path)
