"""Training SASRec."""

from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainingArguments

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
    Trains [`SASRecForSequentialRecommendation`] to predict every next item of
    [`~mmesid.trainer.data.windows.TrainingWindows`].

    ```python
    trainer = SASRecTrainer(model, args, train_dataset=TrainingWindows(data.sequences("train"), 50),
                            eval_dataset=EvaluationHistories(data.sequences("validation")))
    ```
    """

    stage = "sasrec"

    def __init__(self, model: SASRecForSequentialRecommendation, args: TrainingArguments, **kwargs):
        super().__init__(model, args, data_collator=ItemCollator(model.config.max_history), **kwargs)
