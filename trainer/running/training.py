"""What the training stages share: where checkpoints go, early stopping, resuming, and the end of what diverges."""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .arguments import BestEpochTrainingArguments, StageArguments
from .files import read_json
from .records import StageRun
from .sharding import whole_model


logger = logging.get_logger(__name__)

# Steps on an accelerator of which one waits for its loss. A loss that is not finite stays so.
STEPS_BETWEEN_LOOKS = 50


def trainer_arguments(arguments: StageArguments, run: StageRun) -> BestEpochTrainingArguments:
    """The training's arguments as the `Trainer` needs them: its `output_dir` is where checkpoints go, not where the
    stage's result goes, which still names the repository on the Hub."""
    training = copy.copy(arguments.training)
    training.hub_model_id = training.hub_model_id or Path(arguments.output_dir).absolute().name
    training.output_dir = str(run.checkpoints_dir)
    return training


@contextmanager
def temporary_arguments(
    args: BestEpochTrainingArguments | None, args_class: type[BestEpochTrainingArguments]
) -> Iterator[BestEpochTrainingArguments]:
    """The arguments of a training, by default those of `args_class` with checkpoints in a directory that is removed
    afterwards."""
    if args is not None:
        yield args
        return
    with tempfile.TemporaryDirectory() as directory:
        yield args_class(output_dir=directory)


def early_stopping(arguments: BestEpochTrainingArguments) -> list[TrainerCallback]:
    """Stops when the validation metric no longer improves, unless the patience is 0."""
    if arguments.early_stopping_patience == 0:
        return []
    return [EarlyStoppingCallback(early_stopping_patience=arguments.early_stopping_patience)]


# What a call such as `train_sasrec` makes before it has a trainer.
MADE_BY_CALL = {
    "model_init": "this call makes the model; the trainer takes it, and has hyperparameter_search",
    "model": "this call makes the model; give its configuration, or use the trainer",
    "train_dataset": "this call takes the training split of the data; the trainer takes any",
    "eval_dataset": "this call takes the validation split of the data; the trainer takes any",
    "processing_class": "this call takes the processor of the model; the trainer takes any",
}


def refuse_arguments(given: Mapping[str, object], reasons: Mapping[str, str]) -> None:
    """Raises `ValueError` for an argument of a `Trainer` that has no meaning where it is given: `reasons` says why,
    and what to do instead, by name."""
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} has no meaning here: {reason}.")


class FiniteLossTrainer(Trainer):
    """A [`~transformers.Trainer`] that stops where a loss is NaN or infinite: what comes after it is lost."""

    # Whether FSDP and DeepSpeed can part the model among processes.
    can_be_sharded = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._unseen: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        if not self.can_be_sharded and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"{type(self).__name__} trains a model that is small and cannot be parted among processes; use "
                "--accelerate_config ddp for this stage."
            )

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._unseen.append((self.state.global_step + 1, loss.detach(), inputs.get("items")))
        # An accelerator is not waited for in every step.
        if loss.is_cpu or len(self._unseen) == STEPS_BETWEEN_LOOKS:
            self._require_finite_losses()
        return loss

    def _require_finite_losses(self) -> None:
        latest, self._unseen = self._unseen, []
        finite = torch.stack([one.isfinite().all() for _, one, _ in latest]).tolist() if latest else []
        if not all(finite):
            step, bad, items = latest[finite.index(False)]
            of_whom = "" if items is None else self.of_whom(items)
            raise ValueError(_diverged(f"The loss is {bad.item()} in step {step}{of_whom}"))

    def of_whom(self, items: torch.Tensor) -> str:
        """Whose histories `items` `(batch, length)` are, as the part of a sentence; nothing where nobody can tell."""
        return ""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # A later run would go on from a checkpoint of NaN.
        self._require_finite_losses()
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and self.args.should_save:
            # Of sharded weights the Trainer writes nothing here. What they are the weights of is told beside them, and
            # the directory is there before all processes look whether the best checkpoint exists.
            for one in filter(None, (self.model.config, self.processing_class)):
                one.save_pretrained(output_dir or self.args.output_dir)


def _diverged(what: str) -> str:
    return (
        f"{what}: training has diverged and nothing of it is kept; lower --learning_rate, or bound gradients by "
        "--max_grad_norm 1."
    )


def fit(trainer: Trainer) -> None:
    """
    Trains to the end, from the last whole checkpoint of an interrupted run where there is one, otherwise from
    `resume_from_checkpoint` where it is set, and loads the best checkpoint. The trainer's model is an ordinary one
    then, also where FSDP had sharded it.

    Raises:
        ValueError: If what was trained holds NaN or infinity.
    """
    last = last_whole_checkpoint(Path(trainer.args.output_dir))
    if last is not None and trainer.is_world_process_zero():
        print(f"training goes on from '{last}', which an interrupted run left", flush=True)
    trainer.train(resume_from_checkpoint=last or trainer.args.resume_from_checkpoint)
    trainer.model = trainer.model_wrapped = whole_model(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(_diverged(f"The weight '{name}' holds NaN or infinity after the training"))


def last_whole_checkpoint(directory: Path) -> str | None:
    """The latest checkpoint of a Trainer that was written to its end, which its state is: one that a killed run left
    half-written is passed over, with a warning."""
    checkpoints = [path for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            # The state is written last.
            read_json(checkpoint / TRAINER_STATE_NAME)
            return str(checkpoint)
        except (OSError, ValueError):
            logger.warning("'%s' was not written to its end; training goes on from what came before it.", checkpoint)
    return None
