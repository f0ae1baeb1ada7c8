"""Dual encoders against an independent computation."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPModel

from mmesid.trainer.encoders.dual_encoder import DualEncoder, train_word_tokenizer
from mmesid.trainer.encoders.encoding import encode

from ..siglip_models import save_siglip


CAPTIONS = ["a red shirt", "blue", "a tall green lamp of steel and paper", "赤いシャツ", "shoes"]


def picture(seed: int, size=(50, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def in_batches(encoder: DualEncoder, **inputs) -> torch.Tensor:
    return encode(encoder, batch_size=2, disable_tqdm=True, **inputs)


@pytest.fixture(scope="module")
def clip() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder.from_captions(CAPTIONS, image_size=32, hidden_size=32, max_text_length=8, min_word_frequency=1)


def test_texts_are_read_at_their_end_token_whatever_stands_beside_them(clip):
    embeddings = in_batches(clip, texts=CAPTIONS)
    tokenizer, model = clip.processor.tokenizer, clip.model
    for caption, embedding in zip(CAPTIONS, embeddings):
        ids = tokenizer(caption, truncation=True, max_length=8)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id, "a text that is cut must still end"
        with torch.inference_mode():
            states = model.text_model(input_ids=torch.tensor([ids])).last_hidden_state
            expected = model.text_projection(states[0, -1])
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


def test_tokenizer_knows_frequent_words_of_any_script():
    tokenizer = train_word_tokenizer([*CAPTIONS, "Red lamps", "É red Shirt 赤"], max_length=16, min_word_frequency=2)
    words = [tokenizer.decode([token]) for token in tokenizer("a RED shirt, 赤 e rare-word")["input_ids"]]
    assert words == ["<bos>", "a", "red", "shirt", "<unk>", "赤", "<unk>", "<unk>", "<unk>", "<unk>", "<eos>"]
    assert len(tokenizer) == len(tokenizer.get_vocab()) and tokenizer.pad_token_id == 0


def test_pictures_are_squeezed_scaled_and_projected(clip):
    pictures = [picture(seed) for seed in range(3)]
    embeddings = in_batches(clip, images=pictures)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for image, embedding in zip(pictures, embeddings):
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
        pixels = torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1)).float()[None]
        with torch.inference_mode():
            expected = clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output)[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


def test_saved_encoder_loads_by_the_auto_classes_and_encodes_alike(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").is_file()
    assert type(AutoModel.from_pretrained(tmp_path)) is CLIPModel
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer("red")["input_ids"][0] == 2
    loaded = DualEncoder.from_pretrained(str(tmp_path))
    for inputs in ({"texts": CAPTIONS}, {"images": [picture(0)]}):
        exact = in_batches(clip, **inputs)
        torch.testing.assert_close(in_batches(loaded, **inputs), exact, rtol=1e-5, atol=1e-6)
        half = DualEncoder.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
        assert half.model.dtype == torch.bfloat16
        approximate = in_batches(half, **inputs)
        assert approximate.dtype == torch.float32 and 0 < (approximate - exact).abs().max() < 0.1


@pytest.mark.parametrize("version", [1, 2])
def test_siglip_loads_by_name_and_reads_texts_padded_to_its_length(tmp_path, version):
    encoder = DualEncoder.from_pretrained(save_siglip(tmp_path, version, CAPTIONS))
    texts = in_batches(encoder, texts=CAPTIONS)
    ids = encoder.processor.tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )["input_ids"]
    assert ids.shape == (5, 16)
    with torch.inference_mode():
        states = encoder.model.text_model(input_ids=ids).last_hidden_state
        expected = encoder.model.text_model.head(states[:, -1])
    torch.testing.assert_close(texts, expected, rtol=1e-4, atol=1e-5)

    pictures = [picture(0), picture(1, size=(20, 60)), picture(2)]
    images = in_batches(encoder, images=pictures)
    with torch.inference_mode():
        alone = encoder.model.get_image_features(**encoder.processor(images=pictures[1], return_tensors="pt"))
    assert images.shape == (3, 32)
    torch.testing.assert_close(images[1], alone.pooler_output[0], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_lacks_weights_is_refused(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "text_model" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the model .* for example 'text_model") as error:
        DualEncoder.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_that_is_no_dual_encoder_is_refused(sentence_model):
    with pytest.raises(ValueError, match="is a BertModel, which is no dual encoder"):
        DualEncoder.from_pretrained(f"{sentence_model}/bert")


@pytest.mark.parametrize("sizes", [{"image_size": 40}, {"hidden_size": 40}])
def test_sizes_that_do_not_divide_are_refused(sizes):
    with pytest.raises(ValueError, match="_size is 40; it must be a multiple of 32"):
        DualEncoder.from_captions(CAPTIONS, **sizes)
