"""The public call that trains a dual encoder: what it learns, what it refuses; retrieval and augmentation."""

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw
from transformers import EvalPrediction

from mmesid.trainer.data.preparation import prepare
from mmesid.trainer.encoders.dual_encoder import DualEncoder
from mmesid.trainer.encoders.dual_encoder_training import (
    CaptionedPictures,
    DualEncoderTrainingArguments,
    retrieval_metrics,
    shrink,
    train_dual_encoder,
)
from mmesid.trainer.encoders.embedding import embed

from ..siglip_models import save_siglip


COLOURS = ("red", "yellow", "lime", "cyan", "blue", "white", "gray", "black")
TINY_CLIP = {"image_size": 32, "hidden_size": 32}


def flag(left: str, right: str) -> Image.Image:
    picture = Image.new("RGB", (24, 16), left)
    picture.paste(ImageColor.getrgb(right), (12, 0, 24, 16))
    return picture


@pytest.fixture(scope="module")
def flags():
    """Flags with two colours each, one item for every pair; the last has no picture."""
    pairs = [(left, right) for left in COLOURS for right in COLOURS]
    items = {
        "item_id": list(range(len(pairs))),
        "title": [f"flag of {left} and {right}" for left, right in pairs],
        "image": [*(flag(*pair) for pair in pairs[:-1]), None],
    }
    orders = pd.DataFrame({"user_id": "u", "item_id": items["item_id"], "timestamp": items["item_id"]})
    return prepare(orders, datasets.Dataset.from_dict(items))


def loss(encoder: DualEncoder, data) -> float:
    """The contrastive loss of forty pairs."""
    batch = encoder.prepare(data.titles[1:41], data.items()[:40]["image"])
    with torch.inference_mode():
        return encoder.model(**batch, return_loss=True).loss.item()


def test_a_new_clip_is_trained_without_arguments_and_leaves_nothing_behind(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = train_dual_encoder(flags, caption_column="title", **TINY_CLIP)
    assert loss(encoder, flags) < 0.97 * np.log(40), "pairs find each other more often than by chance"
    assert not encoder.model.training and not list(tmp_path.iterdir())
    pictures = embed(flags, encoder, column="image", disable_tqdm=True)
    assert pictures.embeddings.shape == (65, 32) and pictures.present.tolist() == [False, *[True] * 63, False]


def test_siglip_learns_from_the_catalogue(flags, tmp_path):
    base = save_siglip(tmp_path / "siglip", 2, [f"flag of {' and '.join(COLOURS)}"])
    before = loss(DualEncoder.from_pretrained(base), flags)
    args = DualEncoderTrainingArguments(
        output_dir=str(tmp_path / "checkpoints"), per_device_train_batch_size=8, learning_rate=3e-3,
        num_train_epochs=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    encoder = train_dual_encoder(flags, args, encoder=DualEncoder.from_pretrained(base))
    assert "Siglip" in type(encoder.model).__name__ and loss(encoder, flags) < 0.8 * before


def test_what_cannot_be_trained_is_refused(flags):
    orders = pd.DataFrame({"user_id": "u", "item_id": [1, 2, 3], "timestamp": [1, 2, 3]})
    items = {"item_id": [1, 2, 3], "title": ["One", "Two", None], "image": [flag("red", "blue")] * 3}
    with pytest.raises(ValueError, match="has 2 items with both text and picture, fewer than the 20 that training"):
        train_dual_encoder(prepare(orders, datasets.Dataset.from_dict(items)))
    with pytest.raises(ValueError, match="has no pictures"):
        train_dual_encoder(prepare(orders))
    with pytest.raises(ValueError, match="caption_column is 'image'; choose text or title"):
        train_dual_encoder(flags, caption_column="image")
    encoder = DualEncoder.from_captions(["a flag"], **TINY_CLIP)
    with pytest.raises(ValueError, match="image_size are sizes of a new CLIP, not of one that is trained further"):
        train_dual_encoder(flags, encoder=encoder, image_size=32)
    with pytest.raises(ValueError, match="held_out_fraction is 1.0; it must lie between 0 and 1"):
        DualEncoderTrainingArguments(output_dir="unused", held_out_fraction=1.0)


def test_retrieval_ranks_both_ways_and_ties_count_against():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(30, 2, 4, generator=generator)
    pairs[:20, 1] += 3 * pairs[:20, 0]
    pairs[7] = pairs[8]
    pairs = torch.nn.functional.normalize(pairs, dim=-1)
    ranks = []
    for this, other in ((0, 1), (1, 0)):
        for index in range(30):
            scores = [float(pairs[index, this] @ pairs[candidate, other]) for candidate in range(30)]
            better = sum(score > scores[index] - 1e-6 for number, score in enumerate(scores) if number != index)
            ranks.append(1 + better)
    assert ranks[7] > 1 and ranks[8] > 1
    metrics = retrieval_metrics(EvalPrediction(predictions=pairs.numpy(), label_ids=np.zeros(30)))
    assert metrics["recall@1"] == pytest.approx(np.mean([rank <= 1 for rank in ranks]))
    assert metrics["recall@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]))
    assert metrics["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert 0.2 < metrics["recall@1"] < 1


def test_only_training_pairs_are_augmented():
    caption = "one two three four five six seven eight nine ten"
    image = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 9, 39), fill="black")
    pictures = shrink([image], 20)
    assert pictures[0].size == (20, 20)
    plain = CaptionedPictures(["unused", caption], [image, *pictures], indices=[1])
    assert len(plain) == 1 and plain[0] == (caption, pictures[0])
    torch.manual_seed(0)
    augmented = CaptionedPictures([caption], pictures, indices=[0], augment=True)
    samples = [augmented[0] for _ in range(50)]
    kept = [words.split() for words, _ in samples]
    assert all(word in caption.split() for words in kept for word in words)
    assert 5 < np.mean([len(words) for words in kept]) < 9
    assert {18, 19, 20} >= {image.width for _, image in samples} > {20}
    dark_left = [image.getpixel((0, 5))[0] < image.getpixel((image.width - 1, 5))[0] for _, image in samples]
    assert 10 < sum(dark_left) < 40, "about half of the pictures are mirrored"
