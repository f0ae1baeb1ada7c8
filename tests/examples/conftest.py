"""A tiny run that several examples read."""

import json
from pathlib import Path

import pytest
import torch

import mmesid
from mmesid.trainer.data.preparation import prepare_source
from mmesid.trainer.data.sources.synthetic import generate_catalogue
from mmesid.trainer.data.tables import EmbeddingTable, save_table
from mmesid.trainer.quantizer.semantic_ids import SEMANTIC_IDS_NAME, write_semantic_ids
from mmesid.trainer.running.records import RECORD_NAME, write_text_atomic


WIDTHS = {"collaborative": 6, "text": 10}
HIDDEN_SIZE = 32


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> Path:
    """A run with recommenders as they are saved after fine-tuning, but that were drawn with another seed instead:
    `tuned` in the paper's form, from trained code vectors, and `text_random`, text alone, from random ones."""
    root = tmp_path_factory.mktemp("run")
    data = prepare_source(generate_catalogue(num_items=60, num_users=40))
    data.save(root / "prepared")
    generator = torch.Generator().manual_seed(0)
    tables = {}
    (root / "embeddings").mkdir()
    for name, width in WIDTHS.items():
        table = torch.randn(data.num_items + 1, width, generator=generator)
        present = torch.arange(data.num_items + 1) > (1 if name == "text" else 0)
        tables[name] = EmbeddingTable(table * present[:, None], present)
        save_table(root / "embeddings" / f"{name}.safetensors", name, *tables[name])
    quantizer, codes = mmesid.quantize(
        data,
        tables,
        # As wide as the decoder: code vectors start as they are.
        mmesid.MMRQVAEConfig(num_quantizers=2, codebook_size=8, codebook_dim=HIDDEN_SIZE),
        mmesid.MMRQVAETrainingArguments(root / "checkpoints", num_train_epochs=1),
    )
    quantizer.save_pretrained(root / "quantizer")
    write_semantic_ids(root / "quantizer" / SEMANTIC_IDS_NAME, data.item_ids, codes)
    for name, modalities, initialization, form in (
        ("tuned", list(WIDTHS), "trained", {"share_item_table": False, "use_item_ids": False}),
        ("text_random", ["text"], "random", {}),
    ):
        model, _ = mmesid.build_recommender(
            data,
            {modality: tables[modality] for modality in modalities},
            quantizer,
            {modality: codes[modality] for modality in modalities},
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=1,
            code_initialization=initialization,
            seed=7,
            **form,
        )
        model.save_pretrained(root / name)
    # The other one was saved in Python.
    record = {"stage": "finetune", "fingerprint": "", "arguments": {"code_initialization": "random"}, "seconds": 1.0}
    write_text_atomic(root / "text_random" / RECORD_NAME, json.dumps(record))
    return root
