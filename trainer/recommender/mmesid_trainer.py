"""Training the MME-SID recommender."""

from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from modeling_mmesid import MMESIDForSequentialRecommendation
from modeling_mmesid.packing import should_try_flex_attention, use_attention

from .collators import HistoryCollator
from .description import describe_items
from .sequential_trainer import SequentialRecommendationTrainer


logger = logging.get_logger(__name__)


class MMESIDTrainer(SequentialRecommendationTrainer):
    """
    Trains [`MMESIDForSequentialRecommendation`] on all prefixes of every user, packed into one sequence a user.

    ```python
    trainer = MMESIDTrainer(
        model,
        args,
        train_dataset=TrainingWindows(data.sequences("train"), model.config.max_history),
        eval_dataset=EvaluationHistories(data.sequences("validation")),
    )
    ```

    Args:
        model ([`MMESIDForSequentialRecommendation`]): The recommender, its items initialised.
        args (`TrainingArguments`): Settings of the training.
        packed (`bool`, *optional*, defaults to `True`): Let the prefixes of a user share a sequence, wherever the
            backbone's attention takes the mask; otherwise each is a row of its own, with a warning.
        num_candidates (`int`, *optional*, defaults to `0`): Estimate the loss from this many sampled items, drawn by
            smoothed popularity; 0 takes the whole catalogue.
        flex_attention (`bool`, *optional*, defaults to `True`): Let FlexAttention read packed sequences in training
            where the backbone is on CUDA and has SDPA, if a trial finds that it gives the same states and gradients;
            otherwise SDPA stays, with a warning.
        **kwargs: Further arguments of [`~transformers.Trainer`].
    """

    stage = "finetune"

    def __init__(
        self,
        model: MMESIDForSequentialRecommendation,
        args: TrainingArguments,
        packed: bool = True,
        num_candidates: int = 0,
        flex_attention: bool = True,
        **kwargs,
    ):
        config = model.config
        collator = HistoryCollator(
            config.max_history,
            config.prompt_suffix_ids,
            packed=packed,
            num_candidates=num_candidates,
            sampling_weights=smoothed_popularity(model.items.fusion.frequencies) if num_candidates else None,
        )
        super().__init__(model, args, data_collator=collator, **kwargs)
        self.train_attention = model.backbone.config._attn_implementation
        if packed and config.prompt_suffix_ids and self.train_dataset is not None:
            # Only now: on the device, and in the precision, that training will have.
            with self.accelerator.autocast():
                self._try_packing(flex_attention)

    def _try_packing(self, flex_attention: bool) -> None:
        model, backbone = self.model, self.model.backbone
        problem = model.packing_problem()
        if problem is not None:
            self.data_collator.packed = False
            logger.warning(
                "The prefixes of a user cannot share a sequence on %s: %s. Every prefix becomes a row of its own, "
                "many times as many; lower per_device_train_batch_size if memory runs out.",
                type(backbone).__name__,
                problem,
            )
        elif flex_attention and should_try_flex_attention(
            model.device.type, backbone._supports_flex_attn, self.train_attention
        ):
            problem = model.attention_problem("flex_attention")
            if problem is None:
                self.train_attention = "flex_attention"
            else:
                logger.warning(
                    "FlexAttention cannot read the packed prefixes of %s: %s. SDPA reads them, with a mask of every "
                    "pair of positions.",
                    type(backbone).__name__,
                    problem,
                )

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        # For this alone: to single prefixes, in evaluation and in use, FlexAttention has nothing to skip.
        with use_attention(self.accelerator.unwrap_model(self.model).backbone, self.train_attention):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs: dict[str, torch.Tensor], *args, **kwargs):
        return super().compute_loss(model, inputs | {"shared_prompt": True}, *args, **kwargs)

    def encode(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs, shared_prompt=True).user_embeddings

    def describe(self, directory: Path) -> tuple[dict, dict]:
        config = self.model.config
        details = {"modalities": config.modalities, "base_model": config.base_model_name_or_path}
        if self.processing_class is None:
            return {}, details
        metrics, examples = describe_items(self.accelerator.unwrap_model(self.model), self.processing_class, directory)
        return metrics, details | examples


def smoothed_popularity(frequencies: torch.Tensor, exponent: float = 0.75) -> torch.Tensor:
    """(1 + freq)^0.75, with which word2vec draws its negatives: tail items are still drawn, popular ones more often.
    Row 0 is padding and never drawn."""
    weights = (1 + frequencies.cpu().double()) ** exponent
    weights[0] = 0
    return weights
