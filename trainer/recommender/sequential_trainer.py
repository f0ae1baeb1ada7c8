"""What the trainers of both recommenders share: batches of like length, and evaluation by full ranking."""

import copy
from collections.abc import Callable, Iterator
from operator import itemgetter

import datasets
import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from modeling_mmesid.recommendation import mask_histories, score_items, target_ranks

from ..data.files import listed
from ..data.prepared import Sequences
from ..data.windows import EvaluationHistories, TrainingWindows, as_sequences
from ..metrics.ranking.ranking import Ranking
from ..publishing.hub_trainer import HubTrainerMixin, without_timings
from ..running.sharding import unsharded
from ..running.training import FiniteLossTrainer, refuse_arguments


REFUSED = {
    "compute_loss_func": "the model computes the loss; override compute_loss",
    "preprocess_logits_for_metrics": "only ranks leave the device; give compute_metrics",
}
# What an evaluation measures, as patterns.
RANKING_METRICS = ("hr@*", "ndcg@*", "mrr")


class ResumableLengthGroupedSampler(LengthGroupedSampler):
    """A [`~transformers.trainer_pt_utils.LengthGroupedSampler`] whose order in an epoch does not depend on where
    training was resumed: one that starts at a later epoch, which `epoch` counts from 0 whenever an order is asked for,
    first draws what the earlier ones drew."""

    def __init__(self, batch_size: int, *, epoch: Callable[[], int], **kwargs):
        super().__init__(batch_size, **kwargs)
        self.epoch = epoch
        self.drawn = 0

    def __iter__(self) -> Iterator[int]:
        while self.drawn < self.epoch():
            super().__iter__()
            self.drawn += 1
        self.drawn += 1
        return super().__iter__()


class SequentialRecommendationTrainer(HubTrainerMixin, FiniteLossTrainer):
    """
    A [`~transformers.Trainer`] whose evaluation ranks each user's target among the whole catalogue, history masked.

    Only the ranks leave the device. Evaluation batches are those of [`HistoryCollator`]; the model
    offers `item_table()` and returns `user_embeddings`.

    Args:
        model (`PreTrainedModel`, *optional*): The recommender; or leave it out and give `model_init`, which makes a
            new one for each training, as [`~transformers.Trainer.hyperparameter_search`] needs.
        args (`TrainingArguments`, *optional*): Settings of the training.
        data_collator (`Callable`, *optional*): What makes batches of examples, by default the model's own. Evaluation
            batches have `seen` and `target` besides the model's inputs.
        train_dataset, eval_dataset (*optional*): A split of a prepared dataset (`data.sequences("train")`); a
            `datasets.Dataset` with the columns `history`, rows or, with a processor as `processing_class`, raw item
            ids, oldest first, and `target`, the one that follows; or [`TrainingWindows`] and [`EvaluationHistories`].
            `evaluate` and `predict` take the same.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): Further metrics of an evaluation, from the
            ranks of the targets, `(users,)` from 1, as `predictions`, and the targets as `label_ids`.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        ValueError: If a dataset has no such columns or holds what is no item, its length is not known, or an argument
            has no meaning here.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs,
    ):
        refuse_arguments(kwargs, REFUSED)
        args = TrainingArguments(use_cpu=not torch.accelerator.is_available()) if args is None else copy.copy(args)
        if eval_dataset is not None and len(eval_dataset) == 0 and args.eval_strategy != "no":
            raise ValueError(
                "The data hold nothing out (split none), so that no epoch can be chosen; set --eval_strategy no and "
                "the --num_train_epochs that were best on a split."
            )
        args.batch_eval_metrics = True
        args.remove_unused_columns = False
        # Without an accelerator torch would warn that it has no use for it.
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        self._own_collator, self._own_metrics = data_collator, compute_metrics
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._ranking_metrics,
            **kwargs,
        )
        # Has the Trainer count the targets of what goes into an update, for `compute_loss`.
        self.model_accepts_loss_kwargs = True
        if data_collator is None:
            self.data_collator = self.collator_of(self.model)
        self.train_dataset = self._windows(train_dataset)
        if isinstance(eval_dataset, dict) and not isinstance(eval_dataset, datasets.DatasetDict):
            self.eval_dataset = {name: self._held_out(one) for name, one in eval_dataset.items()}
        else:
            self.eval_dataset = self._held_out(eval_dataset)
        self._item_table: torch.Tensor | None = None

    def collator_of(self, model: PreTrainedModel) -> Callable:
        """What makes batches for a model unless the caller brings a collator."""
        raise NotImplementedError

    def call_model_init(self, trial=None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        # Not the first, which `__init__` asks for: later ones may have another prompt, or items of other frequencies.
        if getattr(self, "model", None) is not None and self._own_collator is None:
            if model.config.max_history != self.model.config.max_history:
                raise ValueError(
                    f"model_init makes models with max_history {self.model.config.max_history} and "
                    f"{model.config.max_history}, and the training data are cut for one; keep it."
                )
            self.data_collator = self.collator_of(model)
        return model

    def hyperparameter_search(
        self, hp_space=None, compute_objective=None, n_trials: int = 20, direction: str | None = None, **kwargs
    ):
        """As [`~transformers.Trainer.hyperparameter_search`], which takes `model_init`; by default for the largest
        `metric_for_best_model`, or nDCG@10, of the last evaluation rather than for the sum of all metrics."""
        metric = "eval_" + (self.args.metric_for_best_model or "ndcg@10").removeprefix("eval_")
        objective = compute_objective or itemgetter(metric)
        return super().hyperparameter_search(hp_space, objective, n_trials, direction or "maximize", **kwargs)

    def _windows(self, dataset):
        if isinstance(dataset, datasets.Dataset | Sequences):
            return TrainingWindows(self._sequences(dataset, "train_dataset"), self.model.config.max_history)
        if dataset is not None and getattr(dataset, "lengths", None) is None:
            raise ValueError(
                f"train_dataset is a {type(dataset).__name__}, which does not tell the lengths of its examples; give "
                "a datasets.Dataset with the columns history and target, or the training split of a prepared dataset."
            )
        return dataset

    def _held_out(self, dataset):
        if isinstance(dataset, datasets.Dataset | Sequences):
            return EvaluationHistories(self._sequences(dataset, "The dataset to evaluate"))
        if isinstance(dataset, datasets.IterableDataset | datasets.DatasetDict):
            raise ValueError(
                f"The dataset to evaluate is a {type(dataset).__name__}; give one split as a datasets.Dataset."
            )
        return dataset

    def _sequences(self, dataset: datasets.Dataset | Sequences, name: str) -> Sequences:
        rows_of = None if self.processing_class is None else self.processing_class.convert_item_ids_to_rows
        sequences = dataset if isinstance(dataset, Sequences) else as_sequences(dataset, name, rows_of)
        largest = max((int(rows.max()) for rows in (sequences.histories, sequences.targets) if len(rows)), default=1)
        if largest > self.model.config.num_items:
            raise ValueError(
                f"{name} holds row {largest}, and the model knows {self.model.config.num_items} items; give the data "
                "that the model was made for."
            )
        return sequences

    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(self._held_out(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(self._held_out(test_dataset))

    def _get_train_sampler(self, train_dataset=None) -> ResumableLengthGroupedSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        generator = torch.Generator().manual_seed(
            self.args.seed if self.args.data_seed is None else self.args.data_seed
        )
        return ResumableLengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            epoch=lambda: int(self.state.epoch or 0),
            lengths=dataset.lengths,
            generator=generator,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the targets of all that goes into an update: of every process, and of accumulated batches."""
        output = model(**inputs)
        loss = output.loss
        if num_items_in_batch is not None:
            # Gradients are averaged over the processes.
            parts = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * (parts * len(output.user_embeddings) / num_items_in_batch)
        return (loss, output) if return_outputs else loss

    def of_whom(self, items: torch.Tensor) -> str:
        if not isinstance(self.train_dataset, TrainingWindows):
            return ""
        return f", of the users {listed(self.train_dataset.users_of(items.cpu().numpy()))}"

    def evaluation_loop(self, *args, **kwargs):
        # A new one: an evaluation that was interrupted must not leave its ranks to the next.
        self._ranking = Ranking(keep_in_memory=True)
        self._ranked: list[tuple[np.ndarray, np.ndarray]] = []
        # The table is the same for all batches: built once per evaluation.
        self.model.eval()
        with torch.no_grad(), unsharded(self.model):
            self._item_table = self.model.item_table()
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._item_table = None

    def _ranking_metrics(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Collects ranks; HR, nDCG and MRR, and the caller's own metrics, after the last batch."""
        self._ranking.add_batch(ranks=prediction.predictions.cpu().numpy())
        if self._own_metrics is not None:
            self._ranked.append((prediction.predictions.cpu().numpy(), prediction.label_ids.cpu().numpy()))
        if not compute_result:
            return {}
        metrics = self._ranking.compute()
        if self._own_metrics is not None:
            ranks, targets = map(np.concatenate, zip(*self._ranked))
            metrics |= self._own_metrics(EvalPrediction(ranks, targets))
        return metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns no loss, the ranks of the targets (`(batch,)`) and the targets."""
        inputs = self._prepare_inputs(inputs)
        if missing := {"seen", "target"} - inputs.keys():
            raise ValueError(
                f"The data collator makes evaluation batches without {' and '.join(sorted(missing))}; it must add "
                "them, as HistoryCollator does: the rows of the whole history, and the row of the target."
            )
        seen, target = inputs.pop("seen"), inputs.pop("target")
        with torch.no_grad():
            with self.compute_loss_context_manager():
                user_embeddings = model(**inputs).user_embeddings
            # Outside of autocast: scores rounded to bf16 tie, and ties count against the target.
            scores = mask_histories(score_items(user_embeddings, self._item_table), seen)
            return None, target_ranks(scores, target), target

    def rank(self, dataset: torch.utils.data.Dataset | None = None) -> dict[str, float]:
        """HR, nDCG and MRR of a held-out split, `eval_dataset` by default, without the prefix and timings of
        `evaluate`."""
        return without_timings(self.evaluate(dataset))

    def split_of(self, dataset) -> str | None:
        sequences = dataset.sequences if isinstance(dataset, EvaluationHistories) else dataset
        split = sequences.split if isinstance(sequences, Sequences) else None
        return super().split_of(dataset) if split is None else split
