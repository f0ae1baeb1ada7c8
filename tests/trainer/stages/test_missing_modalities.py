"""Items without picture, without text and without both, from the source to what the recommender makes of them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmesid.trainer.data.tables import load_table
from mmesid.trainer.encoders.dual_encoder import DualEncoder
from mmesid.trainer.stages import embed, finetune, prepare, quantize
from modeling_mmesid import MMESIDForSequentialRecommendation


NUM_ITEMS = 40
WITHOUT_PICTURE, WITHOUT_TEXT, WITHOUT_BOTH = 5, 7, 9
ABSENT = {"text": [WITHOUT_TEXT, WITHOUT_BOTH], "visual": [WITHOUT_PICTURE, WITHOUT_BOTH]}
TRAINING = ["--num_train_epochs", "1", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Directories prepared, embeddings, quantizer and recommender of a catalogue with gaps."""
    root = tmp_path_factory.mktemp("gaps")
    rng = np.random.default_rng(0)
    folder = root / "folder"
    folder.mkdir()
    items = []
    for row in range(1, NUM_ITEMS + 1):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{row}.png")
        title = None if row in ABSENT["text"] else f"thing {row} of kind {row % 4}"
        picture = None if row in ABSENT["visual"] else f"{row}.png"
        items.append(json.dumps({"item": row, "title": title, "image": picture}))
    (folder / "items.jsonl").write_text("\n".join(items))
    users = [f"u{user} {' '.join(map(str, rng.permutation(NUM_ITEMS)[:12] + 1))}" for user in range(30)]
    (folder / "sequences.txt").write_text("\n".join(users))
    prepared = ["--prepared_dir", str(root / "prepared")]
    embeddings = ["--embeddings_dir", str(root / "embeddings")]
    prepare.main(["--source", "sequences", "--source_dir", str(folder), "--output_dir", prepared[1]])

    torch.manual_seed(0)
    captions = [f"thing {row} of kind {row % 4}" for row in range(NUM_ITEMS)]
    encoder = DualEncoder.from_captions(captions, image_size=32, hidden_size=32, min_word_frequency=1)
    encoder.save_pretrained(root / "encoder")
    named = ["--encoder", "dual_encoder", "--model_name_or_path", str(root / "encoder"), "--use_cpu", "true"]
    for modality in ABSENT:
        embed.main([*prepared, "--output_dir", embeddings[1], "--modality", modality, *named])
    sizes = ["--num_quantizers", "2", "--codebook_size", "4", "--codebook_dim", "8"]
    shared = [*prepared, *embeddings, "--modalities", *ABSENT, *TRAINING]
    quantize.main([*shared, "--output_dir", str(root / "quantizer"), *sizes])
    finetune.main(
        [*shared, "--quantizer_dir", str(root / "quantizer"), "--output_dir", str(root / "recommender")]
        + ["--hidden_size", "16"]
    )
    return root


@pytest.mark.parametrize("modality", ABSENT)
def test_a_missing_modality_is_a_mask_in_table_codes_and_recommender(run, modality):
    absent = ABSENT[modality]
    table, present = load_table(run / f"embeddings/{modality}.safetensors", modality, NUM_ITEMS)
    assert (~present).nonzero().flatten().tolist() == [0, *absent] and table[present].norm(dim=1).min() > 0.9

    codes = pq.read_table(run / "quantizer/semantic_ids.parquet")[modality].to_pylist()
    assert [row for row, ids in enumerate(codes, start=1) if ids is None] == absent

    items = MMESIDForSequentialRecommendation.from_pretrained(run / "recommender").model.items
    assert torch.equal(items.modalities[modality].present, present)
    weights = items.weights(torch.arange(1, NUM_ITEMS + 1))
    source = 1 + list(ABSENT).index(modality)
    assert (weights[:, source] == 0).nonzero().flatten().add(1).tolist() == absent


def test_the_recommender_reads_nothing_where_a_modality_is_missing_and_ranks_every_item(run):
    model = MMESIDForSequentialRecommendation.from_pretrained(run / "recommender")
    history = [[WITHOUT_BOTH, WITHOUT_PICTURE, 3, WITHOUT_TEXT]]
    before = model.recommend(history, top_k=NUM_ITEMS - 4)
    assert torch.isfinite(before.scores).all()
    assert sorted(before.items[0].tolist() + history[0]) == list(range(1, NUM_ITEMS + 1))

    for modality, absent in ABSENT.items():
        model.model.items.modalities[modality].embeddings[absent] = 100.0
        model.model.items.modalities[modality].codes[absent] = 1
    after = model.recommend(history, top_k=NUM_ITEMS - 4)
    assert torch.equal(after.items, before.items) and torch.equal(after.scores, before.scores)
    # Where the modality is there, its values do count.
    model.model.items.modalities["visual"].embeddings[3] += 100.0
    assert not torch.equal(model.recommend(history, top_k=NUM_ITEMS - 4).scores, before.scores)
