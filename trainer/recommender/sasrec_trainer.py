"""Training SASRec."""

from dataclasses import dataclass
from typing import ClassVar

from modeling_mmesid import SASRecForSequentialRecommendation

from ..running.arguments import BestEpochTrainingArguments
from .collators import ItemCollator
from .sequential_trainer import RANKING_METRICS, SequentialRecommendationTrainer


@dataclass(kw_only=True)
class SASRecTrainingArguments(BestEpochTrainingArguments):
    """Arguments of [`SASRecTrainer`]."""

    metric_names: ClassVar[tuple[str, ...]] = RANKING_METRICS

    num_train_epochs: float = 60


class SASRecTrainer(SequentialRecommendationTrainer):
    """
    Trains [`SASRecForSequentialRecommendation`] to predict every next item; arguments as in
    [`SequentialRecommendationTrainer`].

    ```python
    trainer = SASRecTrainer(model, args, train_dataset=data.sequences("train"),
                            eval_dataset=data.sequences("validation"))
    ```
    """

    stage = "sasrec"

    def collator_of(self, model: SASRecForSequentialRecommendation) -> ItemCollator:
        return ItemCollator(model.config.max_history)
