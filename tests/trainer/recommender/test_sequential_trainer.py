"""What the trainers of both recommenders promise, on a world where the next item is known."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, MistralConfig, TrainingArguments, set_seed
from transformers.trainer_utils import HPSearchBackend

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.windows import EvaluationHistories, TrainingWindows
from mmesid.trainer.recommender.collators import HistoryCollator, ItemCollator
from mmesid.trainer.recommender.mmesid_trainer import MMESIDTrainer, smoothed_popularity
from mmesid.trainer.recommender.sasrec_trainer import SASRecTrainer
from modeling_mmesid import (
    MMESIDConfig,
    MMESIDForSequentialRecommendation,
    SASRecConfig,
    SASRecForSequentialRecommendation,
)
from modeling_mmesid.recommendation import score_items


NUM_ITEMS = 30


def walks(starts: np.ndarray, lengths: np.ndarray) -> Sequences:
    """Every user walks the catalogue in order: item 7 is always followed by item 8."""
    rows = [(start + np.arange(length + 1)) % NUM_ITEMS + 1 for start, length in zip(starts, lengths, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.concatenate([walk[:-1] for walk in rows]).astype(np.int32)
    targets = np.array([walk[-1] for walk in rows], dtype=np.int32)
    return Sequences([str(user) for user in range(len(rows))], flat, offsets, targets)


def cyclic(users: int, seed: int) -> Sequences:
    random = np.random.default_rng(seed)
    return walks(random.integers(0, NUM_ITEMS, size=users), random.integers(1, 8, size=users))


def arguments(tmp_path, **settings) -> TrainingArguments:
    quick = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **quick | settings)


def sasrec_trainer(args):
    dropouts = dict.fromkeys(("embedding_dropout", "hidden_dropout", "attention_dropout"), 0.0)
    config = SASRecConfig(num_items=NUM_ITEMS, hidden_size=32, max_history=10, **dropouts)
    return SASRecTrainer(
        SASRecForSequentialRecommendation(config),
        args,
        train_dataset=TrainingWindows(cyclic(200, 0), 10),
        eval_dataset=EvaluationHistories(cyclic(61, 1)),
    )


def mmesid_trainer(args, backbone_class=LlamaConfig, backbone_kwargs=None, **kwargs):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MMESIDConfig(
        backbone_config=backbone_class(vocab_size=10, **sizes, **(backbone_kwargs or {})),
        num_items=NUM_ITEMS,
        item_token_scale=5.0,
        token_dropout=0.0,
        output_dropout=0.0,
        prompt_prefix_ids=[1, 2],
        prompt_suffix_ids=[3],
    )
    model = MMESIDForSequentialRecommendation(config)
    model.initialize_items(torch.ones(NUM_ITEMS + 1, dtype=torch.long))
    return MMESIDTrainer(
        model,
        args,
        train_dataset=TrainingWindows(cyclic(200, 0), 10),
        eval_dataset=EvaluationHistories(cyclic(61, 1)),
        **kwargs,
    )


def sampled_mmesid_trainer(args):
    return mmesid_trainer(args, num_candidates=20)


def unpacked_mmesid_trainer(args):
    # A window shorter than prompt and history, which a packed sequence cannot respect.
    trainer = mmesid_trainer(args, MistralConfig, {"sliding_window": 8, "num_key_value_heads": 2})
    assert not trainer.data_collator.packed
    return trainer


@pytest.mark.parametrize("make", [sasrec_trainer, mmesid_trainer, sampled_mmesid_trainer, unpacked_mmesid_trainer])
def test_training_learns_the_rule(make, tmp_path):
    set_seed(0)
    sizes = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 16}
    trainer = make(arguments(tmp_path, max_steps=-1, num_train_epochs=12, learning_rate=1e-2, **sizes))
    before = trainer.rank()["hr@5"]
    trainer.train()
    assert before < 0.5
    assert trainer.rank()["hr@5"] > 0.95


def test_a_backbone_that_cannot_take_the_mask_is_named_in_a_warning(tmp_path, caplog):
    unpacked_mmesid_trainer(arguments(tmp_path))
    assert "cannot share a sequence on MistralModel: its sliding window of 8" in caplog.text


def test_flex_attention_that_fails_its_trial_is_not_used(tmp_path, caplog, monkeypatch):
    """As on CUDA, where it is tried; on the CPU it has no backward pass."""
    monkeypatch.setattr("mmesid.trainer.recommender.mmesid_trainer.should_try_flex_attention", lambda model: True)
    with torch.compiler.set_stance("force_eager"):
        trainer = mmesid_trainer(arguments(tmp_path))
    assert "FlexAttention cannot read the packed prefixes of LlamaModel" in caplog.text
    assert "does not support backward on CPU" in caplog.text
    assert trainer.data_collator.packed and trainer.train_attention == "sdpa"
    caplog.clear()
    chosen = mmesid_trainer(arguments(tmp_path), flex_attention=False)
    assert chosen.train_attention == "sdpa" and not caplog.text
    assert trainer.train().training_loss > 0


def test_the_attention_of_training_is_that_of_training_alone(tmp_path):
    trainer = mmesid_trainer(arguments(tmp_path))
    assert trainer.train_attention == "sdpa", "FlexAttention is not tried on the CPU"
    trainer.train_attention, seen = "eager", []
    trainer.model.model.backbone.register_forward_pre_hook(
        lambda backbone, _: seen.append((backbone.training, backbone.config._attn_implementation))
    )
    trainer.train()
    trainer.evaluate()
    assert set(seen) == {(True, "eager"), (False, "sdpa")}


def test_batches_hold_histories_of_like_length(tmp_path):
    trainer = mmesid_trainer(arguments(tmp_path))
    spread = [int(np.ptp((batch["items"] != 0).sum(1).numpy())) for batch in trainer.get_train_dataloader()]
    lengths = trainer.train_dataset.lengths
    assert sum((batch["items"] != 0).sum().item() for batch in trainer.get_train_dataloader()) == sum(lengths)
    assert np.mean(spread) < 1.5 < np.ptp(lengths)


def test_candidates_are_drawn_by_smoothed_popularity():
    weights = smoothed_popularity(torch.tensor([0, 0, 15, 80]))
    assert weights.tolist() == pytest.approx([0.0, 1.0, 8.0, 27.0])
    torch.manual_seed(0)
    collator = HistoryCollator(3, num_candidates=36_000, sampling_weights=weights)
    batch = collator([{"history": np.array([1, 2]), "targets": np.array([2, 3])}])
    counts = torch.bincount(batch["candidates"], minlength=4)
    assert counts[0] == 0
    # The counts that the loss corrects by are those that come out.
    expected = torch.zeros(4).index_copy(0, batch["candidates"], batch["candidate_log_counts"].exp())
    torch.testing.assert_close(counts[1:].float(), expected[1:], rtol=0.1, atol=0)


def test_gradient_accumulation_makes_the_same_update(tmp_path):
    """A mean loss that the Trainer took for a sum would update twice as far."""
    weights = []
    for batch_size, steps in ((64, 1), (32, 2)):
        set_seed(0)
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        settings |= {"max_steps": 1, "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        trainer = mmesid_trainer(arguments(tmp_path, **settings))
        # Equal lengths, so that the mean over users is the mean over targets.
        trainer.train_dataset = TrainingWindows(walks(np.arange(64), np.full(64, 4)), 10)
        trainer.train()
        weights.append(trainer.model.model.items.id_embeddings.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_the_caller_s_arguments_are_left_alone(tmp_path):
    given = arguments(tmp_path)
    sasrec_trainer(given)
    assert given.batch_eval_metrics is False


def test_collators_keep_the_whole_history_for_masking():
    example = {"history": np.array([4, 5, 6], dtype=np.int32), "target": 9}
    batch = HistoryCollator(2, [2])([example])
    # The prompt before the items is the model's to add, once for all users.
    assert batch["items"].tolist() == [[5, 6, *[0] * 6]]
    assert batch["seen"].tolist() == [[4, 5, 6]]
    assert batch["target"].tolist() == [9]
    assert set(ItemCollator(2)([example])) == {"items", "seen", "target"}


def test_padding_never_reaches_beyond_the_learnt_positions():
    example = {"history": np.arange(1, 11), "targets": np.arange(2, 12)}
    batch = ItemCollator(10)([example, {"history": np.array([3]), "targets": np.array([4])}])
    assert batch["items"].shape == batch["labels"].shape == (2, 10)


def test_ranks_under_bf16_do_not_suffer_from_ties(tmp_path):
    """Scores that differ by less than bf16 resolves: rounded, they would tie and rank every target last."""
    trainer = sasrec_trainer(arguments(tmp_path, bf16=True))
    with torch.no_grad():
        trainer.model.model.norm.weight.zero_()
        trainer.model.model.norm.bias.copy_(torch.eye(32)[0])
        table = trainer.model.item_table()
        table.zero_()
        table[1:, 0] = 1 + torch.arange(NUM_ITEMS) * 1e-5
    example = {"history": np.array([1]), "target": NUM_ITEMS}
    assert trainer.rank([example])["mrr"] == 1.0


@pytest.mark.parametrize("make", [sasrec_trainer, mmesid_trainer])
def test_ranks_alone_come_back_from_a_batch_and_nothing_keeps_gradients(make, tmp_path, monkeypatch):
    trainer = make(arguments(tmp_path))
    returned, graphs = [], []

    def step(*args, **kwargs):
        returned.append(type(trainer).prediction_step(trainer, *args, **kwargs))
        return returned[-1]

    def scored(user_embeddings, item_table):
        scores = score_items(user_embeddings, item_table)
        # Not `requires_grad`: SASRec's table is the parameter itself.
        graphs.append([tensor.grad_fn for tensor in (user_embeddings, item_table, scores)])
        return scores

    monkeypatch.setattr(trainer, "prediction_step", step)
    monkeypatch.setattr("mmesid.trainer.recommender.sequential_trainer.score_items", scored)
    trainer.rank()
    assert graphs == [[None] * 3] * len(returned)
    assert sum(len(ranks) for _, ranks, _ in returned) == 61
    for loss, *tensors in returned:
        assert loss is None
        for tensor in tensors:
            assert tensor.ndim == 1 and tensor.dtype == torch.long
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a part that keeps the whole alive"


def as_dataset(sequences: Sequences, ids: bool = False) -> datasets.Dataset:
    item = str if ids else int
    rows = [sequences[index] for index in range(len(sequences))]
    histories = [list(map(item, row["history"])) for row in rows]
    return datasets.Dataset.from_dict({"history": histories, "target": [item(row["target"]) for row in rows]})


class Processor:
    """Raw ids are the rows as text."""

    def convert_item_ids_to_rows(self, item_ids):
        return [int(item_id) for item_id in item_ids]

    def save_pretrained(self, directory):
        pass


@pytest.mark.parametrize("trainer_class", [SASRecTrainer, MMESIDTrainer])
def test_datasets_of_one_s_own_and_model_init_train_as_windows_and_a_model_do(trainer_class, tmp_path):
    make = sasrec_trainer if trainer_class is SASRecTrainer else mmesid_trainer
    set_seed(0)
    usual = make(arguments(tmp_path))
    start = {name: value.clone() for name, value in usual.model.state_dict().items()}
    model_class, config = type(usual.model), usual.model.config

    def model_init():
        model = model_class(config)
        model.load_state_dict(start)
        return model

    given = [
        (as_dataset(cyclic(200, 0)), None),
        (as_dataset(cyclic(200, 0), ids=True), Processor()),
        (cyclic(200, 0), None),
    ]
    usual.train()
    expected = usual.rank()
    for dataset, processor in given:
        trainer = trainer_class(
            model_init=model_init,
            args=arguments(tmp_path),
            train_dataset=dataset,
            eval_dataset={"held_out": cyclic(61, 1)},
            processing_class=processor,
            compute_metrics=lambda prediction: {
                "worst": int(prediction.predictions.max()),
                "users": len(prediction.label_ids),
            },
        )
        trainer.train()
        for name, value in usual.model.state_dict().items():
            torch.testing.assert_close(trainer.model.state_dict()[name], value, msg=name)
        metrics = trainer.evaluate(as_dataset(cyclic(61, 1)))
        assert {name: metrics[f"eval_{name}"] for name in expected} == expected
        assert 1 < metrics["eval_worst"] <= NUM_ITEMS and metrics["eval_users"] == 61


def test_a_search_is_for_the_ranking_metric(tmp_path, monkeypatch):
    """With the interface of a search backend, of which none is installed here."""

    class Backend:
        name = "wandb"

        def ensure_available(self):
            pass

        def default_hp_space(self, trial):
            return {}

        def run(self, trainer, n_trials, direction, **kwargs):
            found = {}
            for rate in [1e-6, 1e-2][:n_trials]:
                trainer.train(trial={"learning_rate": rate})
                found[rate] = trainer.compute_objective(trainer.evaluate())
                assert found[rate] == trainer.measured["validation"]["ndcg@10"]
            return (max if direction == "maximize" else min)(found, key=found.get)

    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, Backend)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="run")))
    usual = sasrec_trainer(arguments(tmp_path))
    trainer = SASRecTrainer(
        model_init=lambda trial: SASRecForSequentialRecommendation(usual.model.config),
        args=arguments(tmp_path, max_steps=30, per_device_train_batch_size=64),
        train_dataset=cyclic(200, 0),
        eval_dataset=cyclic(61, 1),
    )
    assert trainer.hyperparameter_search(n_trials=2, backend="wandb") == 1e-2


def test_an_own_collator_makes_the_batches(tmp_path):
    seen = []

    def collate(examples):
        seen.append(len(examples))
        batch = ItemCollator(10)(examples)
        return {name: tensor for name, tensor in batch.items() if keep_target or name != "target"}

    keep_target = True
    usual = sasrec_trainer(arguments(tmp_path))
    trainer = SASRecTrainer(
        usual.model, arguments(tmp_path), collate, train_dataset=cyclic(20, 0), eval_dataset=cyclic(20, 1)
    )
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 3 and seen[-3:] == [8, 8, 4]
    keep_target = False
    with pytest.raises(ValueError, match="makes evaluation batches without target; it must add"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_dataset": datasets.Dataset.from_dict({"items": [[1]]})}, "train_dataset has the columns items; give"),
        ({"train_dataset": datasets.Dataset.from_dict({"history": [[0]], "target": [1]})}, "neither rows from 1 nor"),
        (
            {"train_dataset": datasets.Dataset.from_dict({"history": [["a"]], "target": ["b"]})},
            "give the processor as",
        ),
        (
            {"train_dataset": datasets.Dataset.from_dict({"history": [[1], None], "target": [2, 3]})},
            "no list, or no t",
        ),
        (
            {"train_dataset": datasets.Dataset.from_dict({"history": [[99]], "target": [1]})},
            "holds row 99, and the mo",
        ),
        ({"train_dataset": [{"history": [1], "targets": [2]}]}, "is a list, which does not tell the lengths"),
        ({"eval_dataset": datasets.DatasetDict()}, "is a DatasetDict; give one split"),
        ({"compute_loss_func": len}, "compute_loss_func has no meaning here"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_a_sentence(tmp_path, given, words):
    model = SASRecForSequentialRecommendation(SASRecConfig(num_items=NUM_ITEMS, hidden_size=16))
    with pytest.raises(ValueError, match=words):
        SASRecTrainer(model, arguments(tmp_path), **given)


def test_a_loss_that_nobody_has_looked_at_yet_leaves_no_checkpoint(tmp_path):
    trainer = sasrec_trainer(arguments(tmp_path / "training"))
    trainer._unseen = [(2, torch.tensor(1.0), None), (3, torch.tensor(float("nan")), None)]
    with pytest.raises(ValueError, match="The loss is nan in step 3: training has diverged"):
        trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Waits(TorchDispatchMode):
    """What an accelerator would be waited for: numbers that are read, and results whose size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [one for one in args[1] if one is not None] if name == "index" else []
        if name in self.NAMES or any(mask.dtype == torch.bool for mask in masks):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (sasrec_trainer, ["nonzero"]),
        (mmesid_trainer, ["nonzero"]),
        # Which rows of the table are needed at all.
        (sampled_mmesid_trainer, ["nonzero", "_unique2"]),
    ],
)
def test_a_step_waits_for_the_device_where_it_must(make, expected, tmp_path):
    trainer = make(arguments(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    count = (batch["labels"] != -100).sum()
    trainer.model.train()
    with Waits() as waits:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
    assert waits.seen == expected
