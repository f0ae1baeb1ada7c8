"""The arguments of every stage: one dataclass a stage, read from flags or YAML by `HfArgumentParser`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments


@dataclass(kw_only=True)
class StageArguments:
    """What every stage has."""

    output_dir: str = field(metadata={"help": "Directory the stage writes to."})
    force: bool = field(default=False, metadata={"help": "Run the stage even if its outputs are up to date."})


@dataclass(kw_only=True)
class StageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this project: evaluate every epoch, keep the epoch that is best on validation, stop early."""

    output_dir: str = field(metadata={"help": "Directory the stage writes to."})
    force: bool = field(default=False, metadata={"help": "Run the stage even if its outputs are up to date."})
    resume: bool = field(
        default=True, metadata={"help": "Continue from the last checkpoint of an interrupted run with the same settings and inputs."}
    )
    early_stopping_patience: int = field(
        default=5, metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`; 0 never stops."}
    )
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Users (quantize: items) a device trains on in one step."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Users (quantize: items) a device evaluates at a time."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint: no, steps or epoch."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the training loss: no, steps or epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept besides the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Save the checkpoint that is best on validation, not the last."})
    metric_for_best_model: str | None = field(default="ndcg@10", metadata={"help": "Validation metric that chooses the checkpoint."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether a larger `metric_for_best_model` is better."})


def parse(arguments_class: type, argv: list[str] | None = None):
    """
    Reads one stage's arguments from flags, or from a YAML file followed by flags that override it.

    Args:
        arguments_class (`type`): The stage's dataclass.
        argv (`list[str]`, *optional*): The flags without the program's name; `sys.argv[1:]` by default.

    Raises:
        ValueError: If the YAML file holds a key that the stage does not have.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(arguments_class)
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = Path(argv.pop(0))
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        actions = {action.dest: action for action in parser._actions}
        for name in values:
            if name not in actions:
                raise ValueError(f"'{path}' sets '{name}', which {arguments_class.__name__} does not have; see --help.")
            actions[name].required = False
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(argv)[0]
