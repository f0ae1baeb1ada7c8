"""What the training stages share: where checkpoints go, early stopping, resuming."""

import copy
from pathlib import Path

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .arguments import StageTrainingArguments
from .records import StageRun


def trainer_arguments(arguments: StageTrainingArguments, run: StageRun) -> StageTrainingArguments:
    """The arguments as the `Trainer` needs them: its `output_dir` is where checkpoints go, not where the stage's
    result goes, which still names the repository on the Hub."""
    arguments = copy.copy(arguments)
    arguments.hub_model_id = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
    arguments.output_dir = str(run.checkpoints_dir)
    return arguments


def early_stopping(arguments: StageTrainingArguments) -> list[TrainerCallback]:
    """Stops when the validation metric no longer improves, unless the patience is 0."""
    if arguments.early_stopping_patience == 0:
        return []
    return [EarlyStoppingCallback(early_stopping_patience=arguments.early_stopping_patience)]


def fit(trainer: Trainer) -> None:
    """Trains to the end, from the last checkpoint of an interrupted run where there is one, otherwise from
    `resume_from_checkpoint` where it is set, and loads the best checkpoint."""
    checkpoints = Path(trainer.args.output_dir)
    last = get_last_checkpoint(checkpoints) if trainer.args.resume and checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last or trainer.args.resume_from_checkpoint)
