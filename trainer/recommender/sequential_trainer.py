"""What the trainers of both recommenders share: batches of like length, and evaluation by full ranking."""

import copy
from collections.abc import Callable, Iterator

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from modeling_mmesid.recommendation import mask_histories, score_items, target_ranks

from ..metrics.ranking.ranking import Ranking
from ..publishing.hub_trainer import HubTrainerMixin
from ..running.training import FiniteLossMixin


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


class SequentialRecommendationTrainer(FiniteLossMixin, HubTrainerMixin, Trainer):
    """
    A [`~transformers.Trainer`] whose evaluation ranks each user's target among the whole catalogue, history masked.

    Only the ranks leave the device. Evaluation batches are those of [`HistoryCollator`]; the model
    offers `item_table()` and returns `user_embeddings`.
    """

    def __init__(self, model, args: TrainingArguments, **kwargs):
        held_out = kwargs.get("eval_dataset")
        if held_out is not None and len(held_out) == 0 and args.eval_strategy != "no":
            raise ValueError(
                "The data hold nothing out (split none), so that no epoch can be chosen; set --eval_strategy no and "
                "the --num_train_epochs that were best on a split."
            )
        args = copy.copy(args)
        args.batch_eval_metrics = True
        args.remove_unused_columns = False
        # Without an accelerator torch would warn that it has no use for it.
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        super().__init__(model, args, compute_metrics=self._ranking_metrics, **kwargs)
        self._item_table: torch.Tensor | None = None

    def _get_train_sampler(self, train_dataset=None) -> ResumableLengthGroupedSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        generator = torch.Generator().manual_seed(
            self.args.seed if self.args.data_seed is None else self.args.data_seed
        )
        return ResumableLengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            epoch=lambda: int(self.state.epoch or 0),
            lengths=dataset.lengths,
            generator=generator,
        )

    def evaluation_loop(self, *args, **kwargs):
        # A new one: an evaluation that was interrupted must not leave its ranks to the next.
        self._ranking = Ranking(keep_in_memory=True)
        # The table is the same for all batches: built once per evaluation.
        self.model.eval()
        with torch.no_grad():
            self._item_table = self.model.item_table()
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._item_table = None

    def _ranking_metrics(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Collects ranks; HR, nDCG and MRR after the last batch."""
        self._ranking.add_batch(ranks=prediction.predictions.cpu().numpy())
        return self._ranking.compute() if compute_result else {}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns no loss, the ranks of the targets (`(batch,)`) and the targets."""
        inputs = self._prepare_inputs(inputs)
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
        self.evaluate(dataset)
        return self._latest_evaluation()
