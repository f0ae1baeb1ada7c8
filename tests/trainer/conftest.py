"""Small models that several packages' tests load."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel

from mmesid.trainer.encoders.dual_encoder import train_word_tokenizer

from .llm2clip_models import save_clip, save_image_processor, save_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llm2clip(tmp_path_factory) -> str:
    return save_clip(tmp_path_factory.mktemp("llm2clip"))


@pytest.fixture(scope="session")
def image_processor(tmp_path_factory) -> str:
    return save_image_processor(tmp_path_factory.mktemp("image_processor"))


@pytest.fixture(scope="session")
def sentence_model(tmp_path_factory) -> Path:
    """A sentence-transformers model in the folder `sentence`, and the BERT inside it in the folder `bert`."""
    root = tmp_path_factory.mktemp("sentence_model")
    captions = ["a red shirt of cotton", "blue shoes", "flag of white and black", "a green lamp for the table"]
    tokenizer = train_word_tokenizer(captions, max_length=64, min_word_frequency=1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    modules = [Transformer(str(root / "bert")), Pooling(16, pooling_mode="mean")]
    SentenceTransformer(modules=modules).save(str(root / "sentence"))
    return root


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Code of repositories is copied before it is imported; not into the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
