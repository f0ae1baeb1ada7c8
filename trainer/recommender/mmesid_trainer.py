"""Training the MME-SID recommender."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from modeling_mmesid import MMESIDForSequentialRecommendation

from ..running.arguments import BestEpochTrainingArguments, check_ranges
from .attention_trial import attention_problem, packing_problem, should_try_flex_attention, use_attention
from .collators import HistoryCollator
from .description import describe_items
from .sequential_trainer import RANKING_METRICS, SequentialRecommendationTrainer


logger = logging.get_logger(__name__)

# The paper's.
ADAPTER_LEARNING_RATE = 3e-4


@dataclass(kw_only=True)
class MMESIDTrainingArguments(BestEpochTrainingArguments):
    """
    Arguments of [`MMESIDTrainer`].

    Args:
        > Loss

        num_candidates (`int`, *optional*, defaults to `0`): Estimate the loss from this many sampled items, for
            millions of items; 0 takes all.

        > Training

        backbone_learning_rate (`float`, *optional*): Learning rate of the decoder or its adapter; `learning_rate` by
            default, and under LoRA the paper's 3e-4 if that is less.
    """

    metric_names: ClassVar[tuple[str, ...]] = RANKING_METRICS

    backbone_learning_rate: float | None = None
    num_candidates: int = 0
    num_train_epochs: float = 20

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, not_negative=("num_candidates", "backbone_learning_rate"))


class MMESIDTrainer(SequentialRecommendationTrainer):
    """
    Trains [`MMESIDForSequentialRecommendation`] on all prefixes of each user, packed into one sequence per user.

    A backbone whose attention cannot take the mask of packed sequences is found out before training, and reads each
    prefix in a row of its own, with a warning.

    ```python
    trainer = MMESIDTrainer(
        model,
        args,
        train_dataset=data.sequences("train"),
        eval_dataset=data.sequences("validation"),
    )
    ```

    Args:
        model ([`MMESIDForSequentialRecommendation`], *optional*): The recommender, its items initialised.
        args (`TrainingArguments`, *optional*): Settings of the training.
        num_candidates (`int`, *optional*, defaults to `0`): Estimate the loss from this many sampled items, drawn by
            smoothed popularity; 0 takes the whole catalogue.
        backbone_learning_rate (`float`, *optional*): As in [`MMESIDTrainingArguments`].
        flex_attention (`bool`, *optional*, defaults to `True`): Let FlexAttention read packed sequences in training
            where the backbone is on CUDA and has SDPA, if a trial finds that it gives the same states and gradients;
            otherwise SDPA stays, with a warning.
        **kwargs: Further arguments of [`SequentialRecommendationTrainer`].
    """

    stage = "finetune"

    def __init__(
        self,
        model: MMESIDForSequentialRecommendation | None = None,
        args: TrainingArguments | None = None,
        num_candidates: int = 0,
        backbone_learning_rate: float | None = None,
        flex_attention: bool = True,
        **kwargs,
    ):
        self.num_candidates = num_candidates
        self.backbone_learning_rate = backbone_learning_rate
        super().__init__(model, args, **kwargs)
        self.model.model.shares_prompt = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.train_attention = self.model.model.backbone.config._attn_implementation
        packs = self.model.config.prompt_suffix_ids and self.train_dataset is not None
        if packs and isinstance(self.data_collator, HistoryCollator):
            # Only now: on the device, and in the precision, that training will have.
            with self.accelerator.autocast():
                self._try_packing(self.data_collator, flex_attention)

    def collator_of(self, model: MMESIDForSequentialRecommendation) -> HistoryCollator:
        earlier = getattr(self, "data_collator", None)
        weights = smoothed_popularity(model.model.items.fusion.frequencies) if self.num_candidates else None
        return HistoryCollator(
            model.config.max_history,
            model.config.prompt_suffix_ids,
            packed=earlier.packed if isinstance(earlier, HistoryCollator) else True,
            num_candidates=self.num_candidates,
            sampling_weights=weights,
        )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        optimizer, usual = super().create_optimizer(model), self.args.learning_rate
        rate = self.backbone_learning_rate
        if rate is None:
            rate = min(usual, ADAPTER_LEARNING_RATE) if self.accelerator.unwrap_model(model).config.lora else usual
        if rate != usual:
            backbone = {id(parameter) for name, parameter in model.named_parameters() if "model.backbone." in name}
            groups = optimizer.param_groups.copy()
            optimizer.param_groups.clear()
            # The items first: theirs is the learning rate that a training logs.
            for in_backbone in (False, True):
                for group in groups:
                    members = [one for one in group["params"] if (id(one) in backbone) == in_backbone]
                    if members:
                        lr = rate if in_backbone else usual
                        optimizer.add_param_group({**group, "params": members, "lr": lr})
        return optimizer

    def _try_packing(self, collator: HistoryCollator, flex_attention: bool) -> None:
        model = self.model.model
        backbone_name = type(model.backbone).__name__
        problem = packing_problem(model)
        if problem is not None:
            collator.packed = False
            logger.warning(
                f"The prefixes of a user cannot share a sequence on {backbone_name}: {problem}. Each prefix becomes a "
                "row of its own, which makes many times as many rows; lower per_device_train_batch_size if memory "
                "runs out."
            )
        elif flex_attention and should_try_flex_attention(model):
            problem = attention_problem(model, "flex_attention")
            if problem is None:
                self.train_attention = "flex_attention"
            else:
                logger.warning(
                    f"FlexAttention cannot read the packed prefixes of {backbone_name}: {problem}. SDPA reads them, "
                    "with a mask of all pairs of positions."
                )

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        # For training alone: to single prefixes, in evaluation and in use, FlexAttention has nothing to skip.
        with use_attention(self.accelerator.unwrap_model(self.model).model.backbone, self.train_attention):
            return super().training_step(*args, **kwargs)

    def describe(self, directory: Path) -> tuple[dict, dict]:
        config = self.model.config
        details = {"modalities": config.modalities, "base_model": config.base_model_name_or_path}
        if self.processing_class is None:
            return {}, details
        metrics, examples = describe_items(self.accelerator.unwrap_model(self.model), self.processing_class, directory)
        return metrics, details | examples


def smoothed_popularity(frequencies: torch.Tensor) -> torch.Tensor:
    """(1 + freq)^0.75, with which word2vec draws its negatives: tail items are still drawn, popular ones more often.
    Row 0 is padding and never drawn."""
    weights = (1 + frequencies.cpu().double()) ** 0.75
    weights[0] = 0
    return weights
