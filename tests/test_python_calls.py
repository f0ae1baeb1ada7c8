"""What the stages do, as a notebook does it: from two tables to a saved recommender, without directories or flags."""

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback, pipeline

import mmesid
from mmesid.trainer.data.sources.synthetic import generate_catalogue
from modeling_mmesid.pipeline_mmesid import TASK


@pytest.fixture(scope="module")
def shop() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Interactions and items of the synthetic shop, as two tables."""
    source = generate_catalogue(num_items=60, num_users=150, seed=0)
    catalogue, events = source.catalogue, source.interactions
    items = pd.DataFrame({"item_id": catalogue.item_ids, "title": catalogue.titles(), "brand": "Veldt"})
    interactions = pd.DataFrame(
        {
            "buyer": [events.user_ids[user] for user in events.users],
            "item_id": [catalogue.item_ids[item] for item in events.items],
            "timestamp": events.times,
        }
    )
    return interactions, items


class Letters:
    """An encoder of one's own: how often each letter occurs."""

    reads, pooling = ("text",), "counts"

    def prepare(self, texts: list[str]) -> list[str]:
        return texts

    def embed(self, batch: list[str]) -> torch.Tensor:
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        return torch.tensor([[float(text.lower().count(letter)) for letter in alphabet] for text in batch])


class Steps(TrainerCallback):
    """Counts steps."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_from_two_tables_to_a_saved_recommender(shop, tmp_path):
    interactions, items = shop

    data = mmesid.prepare(interactions, items, columns={"user_id": "buyer"}, repeats="first")
    assert re.match(
        r"PreparedDataset\('interactions': 60 items, \d+ users, [\d,]+ interactions, split leave", str(data)
    )
    counts, medians = [Steps() for _ in range(3)], []
    sasrec = mmesid.train_sasrec(
        data,
        mmesid.SASRecConfig(hidden_size=16),
        mmesid.SASRecTrainingArguments(tmp_path / "sasrec", max_steps=4),
        callbacks=[counts[0]],
        compute_metrics=lambda ranks: medians.append(float(np.median(ranks.predictions))) or {"median": medians[-1]},
    )
    tables = {"collaborative": mmesid.embed(data, sasrec), "text": mmesid.embed(data, Letters())}
    quantizer, codes = mmesid.quantize(
        data,
        tables,
        mmesid.MMRQVAEConfig(num_quantizers=2, codebook_size=8, codebook_dim=16),
        mmesid.MMRQVAETrainingArguments(tmp_path / "quantizer", num_train_epochs=1),
        callbacks=[counts[1]],
    )
    model, processor = mmesid.build_recommender(
        data,
        {"text": tables["text"]},
        quantizer,
        {"text": codes["text"]},
        sasrec,
        hidden_size=16,
        user_prompt="{items}",
    )
    arguments = mmesid.MMESIDTrainingArguments(tmp_path / "recommender", max_steps=4)
    mmesid.finetune(model, processor, data, arguments, callbacks=[counts[2]])
    assert [one.steps for one in counts] == [4, 1, 4] and all(1 <= median <= 60 for median in medians) and medians
    for call, name, words in (
        (mmesid.train_sasrec, "model_init", "this call makes the model; the trainer takes it"),
        (mmesid.train_sasrec, "eval_dataset", "this call takes the validation split of the data"),
        (partial(mmesid.finetune, model, processor), "processing_class", "takes the processor of the model"),
        (partial(mmesid.quantize, tables=tables), "compute_metrics", "an evaluation measures distances and codes"),
        (partial(mmesid.quantize, tables=tables), "model_init", "a quantizer is initialized from its items"),
    ):
        with pytest.raises(ValueError, match=f"^{name} has no meaning here: .*{words}"):
            call(data=data, **{name: len})
    results = mmesid.evaluate(data, {"sasrec": sasrec, "mme-sid": model}, bootstrap_resamples=10)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")

    assert list(results) == ["popularity", "co_occurrence", "sasrec", "mme-sid"]
    assert all(0 <= result["test"]["ndcg@10"] <= 1 for result in results.values())
    loaded = mmesid.MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "saved")
    history = processor([data.item_ids[1:4]])
    assert torch.equal(loaded.recommend(history).scores, model.recommend(history).scores)
    assert sorted(codes) == ["collaborative", "text"] and codes["text"].shape == (data.num_items + 1, 2)

    users = loaded(**processor([data.item_ids[1:4]], return_tensors="pt")).user_embeddings
    assert torch.equal(users, loaded.encode_histories(history))
    for recommender in (pipeline(model=str(tmp_path / "saved")), pipeline(TASK, model=loaded, processor=processor)):
        stream = recommender((history for history in (data.item_ids[1:4], data.item_ids[4:6])), top_k=2, batch_size=1)
        assert [len(items) for items in stream] == [2, 2]
        allowed = recommender(data.item_ids[1:4], top_k=1, allowed_items=data.item_ids[7:8])
        assert [item["item_id"] for item in allowed] == data.item_ids[7:8]
    for wrong, words in ((data.item_ids[1], "give a list of item ids"), (iter(data.item_ids), "for each user")):
        with pytest.raises(ValueError, match=words):
            list(recommender(wrong))
    with pytest.raises(ValueError, match="allowed_items is 'sku000009'; give a list"):
        recommender(data.item_ids[1:4], allowed_items="sku000009")
