"""Training the MME-SID recommender."""

from transformers import TrainingArguments

from modeling_mmesid import MMESIDForSequentialRecommendation

from .collators import HistoryCollator
from .sequential_trainer import SequentialRecommendationTrainer


class MMESIDTrainer(SequentialRecommendationTrainer):
    """
    Trains [`MMESIDForSequentialRecommendation`] on all prefixes of every user, packed into one sequence a user.

    ```python
    trainer = MMESIDTrainer(model, args, train_dataset=TrainingWindows(data.sequences("train"),
    model.config.max_history),
                            eval_dataset=EvaluationHistories(data.sequences("validation")))
    ```
    """

    def __init__(self, model: MMESIDForSequentialRecommendation, args: TrainingArguments, **kwargs):
        config = model.config
        collator = HistoryCollator(config.max_history, config.prompt_prefix_ids, config.prompt_suffix_ids)
        super().__init__(model, args, data_collator=collator, **kwargs)
