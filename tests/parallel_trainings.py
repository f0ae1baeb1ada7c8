"""
A program: short trainings, of the kinds that are named, whose losses of each step it writes to a file.

    parallel_trainings.py OUTPUT PER_DEVICE_BATCH_SIZE KIND ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import LlamaConfig, set_seed

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.tables import EmbeddingTable
from mmesid.trainer.data.windows import TrainingWindows
from mmesid.trainer.encoders.dual_encoder import DualEncoder
from mmesid.trainer.encoders.dual_encoder_training import (
    CaptionedPictures,
    DualEncoderTrainer,
    DualEncoderTrainingArguments,
)
from mmesid.trainer.quantizer.initialization import initialize
from mmesid.trainer.quantizer.items import ItemTables
from mmesid.trainer.quantizer.trainer import MMRQVAETrainer, MMRQVAETrainingArguments
from mmesid.trainer.recommender.mmesid_trainer import MMESIDTrainer, MMESIDTrainingArguments
from mmesid.trainer.recommender.sasrec_trainer import SASRecTrainer, SASRecTrainingArguments
from modeling_mmesid import (
    MMESIDConfig,
    MMESIDForSequentialRecommendation,
    MMRQVAEConfig,
    MMRQVAEModel,
    SASRecConfig,
    SASRecForSequentialRecommendation,
)


NUM_ITEMS, MAX_HISTORY = 50, 8
COLOURS = ("red", "yellow", "lime", "cyan", "blue", "white", "gray", "black")
output, batch_size = Path(sys.argv[1]), int(sys.argv[2])


def arguments(arguments_class, **settings):
    usual = {
        "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": 0,
        "logging_strategy": "steps", "logging_steps": 1, "num_train_epochs": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": batch_size, "disable_tqdm": True, "use_cpu": True, "save_total_limit": None,
    }  # fmt: skip
    return arguments_class(output_dir=str(output.with_suffix("")), **usual | settings)


def windows() -> TrainingWindows:
    """64 users of histories of many lengths: batches have other numbers of targets."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, MAX_HISTORY + 1, 64)
    flat, offsets = random.integers(1, NUM_ITEMS + 1, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)])
    users = [str(user) for user in range(len(lengths))]
    targets = random.integers(1, NUM_ITEMS + 1, len(lengths)).astype(np.int32)
    return TrainingWindows(Sequences(users, flat.astype(np.int32), offsets.astype(np.int64), targets), MAX_HISTORY)


def sasrec() -> SASRecTrainer:
    dropouts = dict.fromkeys(("embedding_dropout", "hidden_dropout", "attention_dropout"), 0.0)
    config = SASRecConfig(num_items=NUM_ITEMS, hidden_size=16, max_history=MAX_HISTORY, **dropouts)
    model = SASRecForSequentialRecommendation(config)
    return SASRecTrainer(model, arguments(SASRecTrainingArguments), train_dataset=windows())


def finetune(**settings) -> MMESIDTrainer:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MMESIDConfig(
        backbone_config=LlamaConfig(vocab_size=10, **sizes), num_items=NUM_ITEMS, modalities=["text"],
        embedding_dims=[6], max_history=MAX_HISTORY, num_quantizers=0, token_dropout=0.0, output_dropout=0.0,
        prompt_prefix_ids=[1, 2], prompt_suffix_ids=[3],
    )  # fmt: skip
    model = MMESIDForSequentialRecommendation(config)
    table = torch.randn(NUM_ITEMS + 1, 6)
    model.initialize_items(torch.ones(NUM_ITEMS + 1, dtype=torch.long), {"text": table})
    return MMESIDTrainer(model, arguments(MMESIDTrainingArguments, **settings), train_dataset=windows())


def quantize() -> MMRQVAETrainer:
    tables = {}
    for modality, width in (("collaborative", 8), ("text", 12)):
        present = torch.rand(65) < 0.8
        present[0] = False
        tables[modality] = EmbeddingTable(torch.randn(65, width) * present[:, None], present)
    # An item without any modality is none of the dataset.
    tables["collaborative"].present[1:] = True
    items = ItemTables(tables)
    config = MMRQVAEConfig(
        modalities=["collaborative", "text"], embedding_dims=[8, 12], num_quantizers=2, codebook_size=8,
        codebook_dim=4, encoder_hidden_dims=[8],
    )  # fmt: skip
    model = MMRQVAEModel(config)
    initialize(model, items)
    return MMRQVAETrainer(model, arguments(MMRQVAETrainingArguments), items, items)


def encoder() -> DualEncoderTrainer:
    random = np.random.default_rng(0)
    captions = [f"flag of {left} and {right}" for left in COLOURS for right in COLOURS]
    pictures = [Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in captions]
    dual = DualEncoder.from_captions(captions, image_size=32, hidden_size=32)
    pairs = CaptionedPictures(captions, pictures, list(range(len(captions))))
    return DualEncoderTrainer(dual, arguments(DualEncoderTrainingArguments), train_dataset=pairs)


losses = {}
for kind in sys.argv[3:]:
    set_seed(0)
    trainer = {"sasrec": sasrec, "finetune": finetune, "quantize": quantize, "encoder": encoder}[kind]()
    trainer.train()
    losses[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
if PartialState().is_main_process:
    output.write_text(json.dumps(losses | {"processes": PartialState().num_processes}), encoding="utf-8")
