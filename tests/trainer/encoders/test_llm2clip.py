"""LLM2CLIP on a small Llama and a small stand-in for the CLIP repository, against computations of their own."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPVisionModel, LlamaModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmesid.trainer.encoders.encoding import encode
from mmesid.trainer.encoders.llm2clip import (
    MAX_TEXT_LENGTH,
    LLM2CLIPEncoder,
    make_bidirectional,
    masked_mean,
    tokenize,
)


pytestmark = pytest.mark.usefixtures("modules_cache")

TEXTS = ["  A red shirt\n", "blue", "", "!?", "a tall green lamp of steel and paper, (1995) for 12.50", "红 shirt"]
# What the cards write around a text; the tokenizer adds the first token.
TURN = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"


def full_attention_states(llama: str, text: str) -> tuple[torch.Tensor, list[int]]:
    """
    Last states of one text, from an attention mask that says in full what sees what, without padding.
    """
    model = LlamaModel.from_pretrained(llama, attn_implementation="eager").eval()
    ids = PreTrainedTokenizerFast.from_pretrained(llama)(TURN.format(text.strip()))["input_ids"]
    everything_sees_everything = torch.zeros(1, 1, len(ids), len(ids))
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids]), attention_mask=everything_sees_everything).last_hidden_state
    return states[0], ids


def expected_text_features(llama: str, clip: str, texts: list[str]) -> torch.Tensor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    adapter = load_file(f"{clip}/model.safetensors")
    features = []
    for text in texts:
        states, ids = full_attention_states(llama, text)
        before = len(tokenizer(TURN.split("{}")[0])["input_ids"])
        mean = sum(states[position] for position in range(before, len(ids))) / (len(ids) - before)
        features.append(adapter["text_adapter.weight"] @ mean + adapter["text_adapter.bias"])
    return torch.stack(features)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_masked_means_of_bidirectional_states_projected(llama, llm2clip, tmp_path, batch_size):
    encoder = LLM2CLIPEncoder.from_pretrained(llm2clip, text_model_name_or_path=llama, trust_remote_code=True)
    embeddings = encode(encoder, tmp_path / "shards", texts=TEXTS, batch_size=batch_size, disable_tqdm=True)
    torch.testing.assert_close(embeddings, expected_text_features(llama, llm2clip, TEXTS), rtol=1e-4, atol=1e-5)
    assert encoder.pooling == "mean, bidirectional, projected" and embeddings.shape == (len(TEXTS), 8)


def test_half_precision_gives_nearly_the_same_in_float32(llama, llm2clip):
    encoder = LLM2CLIPEncoder.from_pretrained(
        llm2clip, text_model_name_or_path=llama, dtype=torch.bfloat16, trust_remote_code=True
    )
    assert {encoder.llama.dtype, encoder.clip.dtype} == {torch.bfloat16}
    half, exact = encoder.embed(encoder.prepare(texts=TEXTS)), expected_text_features(llama, llm2clip, TEXTS)
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_later_token_reaches_an_earlier_one_with_and_without_padding(llama):
    causal = LlamaModel.from_pretrained(llama).eval()
    bidirectional = make_bidirectional(LlamaModel.from_pretrained(llama).eval())
    ids = torch.tensor([[0, 20, 30, 40, 50], [0, 20, 30, 40, 60]])
    padded = torch.tensor([[0, 1, 1, 1, 1]] * 2)
    for mask in (None, torch.ones_like(ids), padded):
        for model, reached in ((causal, False), (bidirectional, True)):
            with torch.inference_mode():
                states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            # To rounding: rows of a batch are not computed alike on several threads.
            assert torch.allclose(states[0, 1:4], states[1, 1:4], rtol=0, atol=1e-5) is not reached
    with torch.inference_mode():
        # And what is padded reaches nothing.
        ids[0, 0], ids[1] = 7, ids[0]
        states = bidirectional(input_ids=ids, attention_mask=padded).last_hidden_state
    torch.testing.assert_close(states[0, 1:], states[1, 1:])


def test_tokens_are_those_of_the_whole_turn_and_the_mask_ends_where_the_text_begins(llama):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    batch = tokenize(TEXTS, tokenizer)
    for text, ids, attention, pooling in zip(
        TEXTS, batch["input_ids"], batch["attention_mask"].bool(), batch["pooling_mask"].bool()
    ):
        assert ids[attention].tolist() == tokenizer(TURN.format(text.strip()))["input_ids"]
        assert tokenizer.decode(ids[pooling]) == text.strip() + "<|eot_id|>"
        assert attention.tolist() == sorted(attention.tolist()) and (attention | ~pooling).all()


def test_a_text_that_is_too_long_is_cut_and_still_ends(llama):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    batch = tokenize(["shirt " * 2000, "blue"], tokenizer)
    assert batch["input_ids"].shape == (2, MAX_TEXT_LENGTH) and batch["attention_mask"][0].all()
    assert tokenizer.decode(batch["input_ids"][0, -1:]) == "<|eot_id|>"


def test_masked_mean_leaves_out_what_is_masked():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [1e30, 9.0]]], dtype=torch.bfloat16)
    assert masked_mean(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def test_pictures_go_through_the_clip_models_own_features(llm2clip, image_processor):
    encoder = LLM2CLIPEncoder.from_pretrained(
        llm2clip, image_processor_name_or_path=image_processor, trust_remote_code=True
    )
    pictures = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "white")]
    embeddings = encoder.embed(encoder.prepare(images=pictures))
    weights = load_file(f"{llm2clip}/model.safetensors")
    vision = CLIPVisionModel(CLIPConfig.from_pretrained(llm2clip).vision_config).eval()
    prefix = "vision_model."
    vision.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    pixels = CLIPImageProcessorPil.from_pretrained(image_processor)(images=pictures, return_tensors="pt")
    with torch.inference_mode():
        expected = vision(**pixels).pooler_output @ weights["visual_projection.weight"].T
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    assert encoder.pooling == "projected"


def test_without_its_own_code_the_clip_model_is_refused(llama, llm2clip):
    # The library would take the repository for an ordinary CLIP, and make up a text tower.
    with pytest.raises(ValueError, match=r"lacks \d+ weights .* or one whose code --trust_remote_code true may run"):
        LLM2CLIPEncoder.from_pretrained(llm2clip, text_model_name_or_path=llama)


def test_a_text_model_that_is_no_llama_is_refused(llm2clip):
    with pytest.raises(ValueError, match="is a model of the type clip and no Llama"):
        LLM2CLIPEncoder.from_pretrained(llm2clip, text_model_name_or_path=llm2clip, trust_remote_code=True)
