"""
Saves a quantizer for distances and a recommender whose catalogue has changed since its training, with what they give,
for the tests of later versions.

    python -m tests.modeling_mmesid.save_checkpoints tests/modeling_mmesid/checkpoints_0_1_changed

What a version wrote stays as it is: the next format gets a directory of its own.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, set_seed

from mmesid.trainer.quantizer.initialization import initialize
from mmesid.trainer.quantizer.items import ItemTables
from modeling_mmesid import (
    MMESIDConfig,
    MMESIDForSequentialRecommendation,
    MMESIDProcessor,
    MMRQVAEConfig,
    MMRQVAEModel,
)


NUM_ITEMS = 12
WIDTHS = {"collaborative": 4, "text": 6}
SHAPE = {
    "modalities": list(WIDTHS),
    "embedding_dims": list(WIDTHS.values()),
    "num_quantizers": 2,
    "codebook_size": 4,
    "codebook_dim": 8,
}
REMOVED = 5
HISTORIES = [[1, 2, 3], [5], [13, 4, 7]]


def make_tables() -> ItemTables:
    """Item 3 lacks the text."""
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(NUM_ITEMS + 1, width, generator=generator) for name, width in WIDTHS.items()}
    present = {name: torch.arange(NUM_ITEMS + 1) > 0 for name in WIDTHS}
    present["text"][3] = False
    return ItemTables({name: table * present[name][:, None] for name, table in embeddings.items()}, present)


def make_quantizer(tables: ItemTables) -> MMRQVAEModel:
    set_seed(0)
    quantizer = MMRQVAEModel(MMRQVAEConfig(**SHAPE, objective="stress", num_anchors=10))
    initialize(quantizer, tables)
    return quantizer.eval()


def make_recommender(tables: ItemTables, quantizer: MMRQVAEModel) -> MMESIDForSequentialRecommendation:
    """Row 13 was added after training, and row 5 removed."""
    set_seed(0)
    backbone = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = MMESIDForSequentialRecommendation(
        MMESIDConfig(
            backbone_config=backbone,
            num_items=NUM_ITEMS,
            prompt_prefix_ids=[5],
            prompt_suffix_ids=[7],
            fusion_hidden_size=4,
            **SHAPE,
        )
    )
    model.initialize_items(
        torch.arange(NUM_ITEMS + 1),
        tables.embeddings,
        tables.present,
        quantizer.encode(tables.embeddings).codes,
        {name: quantizer.code_vectors(name) for name in WIDTHS},
    )
    # At first the fusion weighs all sources alike.
    torch.nn.init.normal_(model.items.fusion.output.weight)
    model.eval().add_items(new_embeddings(), quantizer=quantizer)
    model.remove_items([REMOVED])
    return model


def new_embeddings() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(1, width, generator=generator) for name, width in WIDTHS.items()}


def make_processor() -> MMESIDProcessor:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "given": 1, "next": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = MMESIDProcessor(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"),
        [f"id-{row}" for row in range(1, NUM_ITEMS + 1)],
        [f"part {row}" for row in range(1, NUM_ITEMS + 1)],
    )
    processor.add_items(["id-new"], ["new part"])
    return processor


def main(directory: Path) -> None:
    tables = make_tables()
    quantizer = make_quantizer(tables)
    recommender = make_recommender(tables, quantizer)
    quantizer.save_pretrained(directory / "quantizer")
    recommender.save_pretrained(directory / "recommender")
    make_processor().save_pretrained(directory / "recommender")
    for path in directory.rglob("*.py"):
        # Tests read them with the code of this checkout.
        path.unlink()
    best = recommender.recommend(HISTORIES, top_k=8)
    expected = {
        "histories": HISTORIES,
        "items": best.items.tolist(),
        "scores": best.scores.tolist(),
        "embeddings": {name: table.tolist() for name, table in tables.embeddings.items()},
        "codes": {name: values.tolist() for name, values in quantizer.encode(tables.embeddings).codes.items()},
    }
    (directory / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
