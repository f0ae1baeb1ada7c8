"""The arguments of a stage: what it declares itself, and what it offers of its model's and its training's settings."""

import dataclasses
import fnmatch
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import TrainingArguments
from transformers.utils import logging

from mmesid.hub_cards import require_links

from .errors import UsageError
from .files import check_names, read_yaml, to_flags


logger = logging.get_logger(__name__)

# Trackers that an extra installs.
TRACKER_EXTRAS = ("tensorboard", "trackio")
# Settings of TrainingArguments that readers of a card look for, also where they have their defaults.
STATED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs",
    "max_steps", "bf16", "fp16", "seed",
)  # fmt: skip

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: value > 0, "must be a positive number"),
    "not_negative": (lambda value: value >= 0, "must be 0 or a positive number"),
    "share": (lambda value: 0 < value < 1, "must lie between 0 and 1"),
    "decay": (lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
}


def check_ranges(arguments, **names: tuple[str, ...]) -> None:
    """Raises `ValueError` if an argument of the dataclass, named as `positive`, `not_negative`, `share` or `decay`, is
    not."""
    for kind, members in names.items():
        is_in_range, what = _RANGES[kind]
        for name in members:
            value = getattr(arguments, name)
            if value is not None and not (is_in_range(value) and math.isfinite(value)):
                raise ValueError(f"--{name} is {value}; it {what}.")


def changed_arguments(arguments) -> dict:
    """The fields of a dataclass that have no default or differ from it, as JSON values."""
    changed = {}
    for argument in fields(arguments):
        default = argument.default if argument.default_factory is MISSING else argument.default_factory()
        value = getattr(arguments, argument.name)
        if value != default:
            changed[argument.name] = value.value if isinstance(value, Enum) else value
    return changed


def require_reporting(report_to: str | list[str] | None) -> list[str]:
    """The logging services that are asked for, by name; raises `ValueError` for one that is unknown or not
    installed."""
    asked = [report_to] if isinstance(report_to, str) else report_to or ["none"]
    available = get_available_reporting_integrations()
    for name in asked:
        if name not in ("none", "all", *available):
            known, package = ", ".join(INTEGRATION_TO_CALLBACK), name
            if name in TRACKER_EXTRAS:
                package = f"'mmesid[{name}]'"
            raise ValueError(
                f"--report_to {name} needs the package {name}, which is not installed; pip install {package}."
                if name in INTEGRATION_TO_CALLBACK
                else f"--report_to {name} is no service that can be reported to; choose among none, all, {known}."
            )
    return available if "all" in asked else [name for name in asked if name != "none"]


def parse_links(links: list[str] | None) -> dict[str, str]:
    """Related repositories by kind, from `kind=owner/name` each; raises `ValueError` for another form or kind."""
    return require_links(dict(link.partition("=")[::2] for link in links or []))


@dataclass(kw_only=True)
class CommandArguments:
    """
    What the arguments of every command have. A subclass declares its own settings as fields, explains each in its
    docstring, below headings that start with `>`, and names the classes that declare the others.

    Attributes:
        config_class (`type[PreTrainedConfig]`, *optional*): The configuration of the model that the stage makes.
        model_settings (`dict[str, tuple[str, ...]]`): Its settings that the stage offers, by their heading.
        training_class (`type[BestEpochTrainingArguments]`, *optional*): The arguments of the stage's trainer.
        positional (`str`, *optional*): The setting that the first word sets where that is no flag.
        config (`dict`): The model's settings that were asked for: keyword arguments of `config_class`.
        training (`BestEpochTrainingArguments`): The training's settings; set by [`parse`].
        changed (`dict`): All settings that differ from their defaults.
    """

    config_class: ClassVar[type[PreTrainedConfig] | None] = None
    model_settings: ClassVar[dict[str, tuple[str, ...]]] = {}
    training_class: ClassVar[type[TrainingArguments] | None] = None
    positional: ClassVar[str | None] = None

    def __post_init__(self):
        self.config: dict[str, Any] = {}
        self.training: Any = None
        self.changed = changed_arguments(self)

    @property
    def settings(self) -> dict:
        """All settings with their values, as JSON values: those of the stage, of its model and of its training."""
        own = {argument.name: getattr(self, argument.name) for argument in fields(self)}
        return own | self.config | ({} if self.training is None else training_settings(self.training))

    def check(self, **settings) -> None:
        """Raises `ValueError` if the model cannot have the settings asked for, together with these `settings` of
        `config_class` that are not among those the stage offers."""
        if self.config_class is not None:
            try:
                self.config_class(**settings, **self.config)
            except StrictDataclassError as error:
                raise ValueError(str(error.__cause__)) from error


@dataclass(kw_only=True)
class StageArguments(CommandArguments):
    """
    What the arguments of every stage have that writes a directory.

    Args:
        > Data

        output_dir (`str`): Directory that the stage writes to.
        force (`bool`, *optional*, defaults to `False`): Run the stage even if its outputs are up to date.
    """

    output_dir: str
    force: bool = False


@dataclass(kw_only=True)
class ReaderArguments(StageArguments):
    """
    What the arguments of every stage have that reads the prepared dataset.

    Args:
        > Data

        prepared_dir (`str`): Directory written by `mmesid prepare`.
    """

    prepared_dir: str


@dataclass(kw_only=True)
class DeviceArguments:
    """
    What the arguments of every command have that computes without a trainer.

    Args:
        > Computation

        use_cpu (`bool`, *optional*, defaults to `False`): Stay on the CPU even if an accelerator is there.
    """

    use_cpu: bool = False


@dataclass(kw_only=True)
class JsonArguments:
    """
    What the arguments of every command have whose answer another program may read.

    Args:
        > Output

        json (`bool`, *optional*, defaults to `False`): Print JSON, and everything else to standard error.
    """

    json: bool = False


@dataclass(kw_only=True)
class BestEpochTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` that keep the epoch which is best on validation and stop early. What cannot be evaluated cannot
    be chosen: with `eval_strategy="no"` the last epoch is kept.

    Args:
        > Training

        early_stopping_patience (`int`, *optional*, defaults to `5`): Stop after this many evaluations without a better
            `metric_for_best_model`; 0 never stops.
        hub_links (`list[str]`, *optional*): Related repositories that the card on the Hub links to, kind=owner/name
            each; kinds are dataset, sasrec, encoder, quantizer and recommender.

    Attributes:
        metric_names (`tuple[str, ...]`): Patterns of the metrics that an evaluation gives.
        smaller_is_better (`tuple[str, ...]`): Those of them that fall as the model improves.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("*",)
    smaller_is_better: ClassVar[tuple[str, ...]] = ("loss",)

    early_stopping_patience: int = 5
    hub_links: list[str] | None = None
    per_device_train_batch_size: int = 128
    per_device_eval_batch_size: int = 256
    learning_rate: float = 1e-3
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    save_strategy: Literal["no", "steps", "epoch", "best"] = "epoch"
    logging_strategy: Literal["no", "steps", "epoch"] = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    restore_callback_states_from_checkpoint: bool = True
    metric_for_best_model: str | None = "ndcg@10"
    greater_is_better: bool | None = None
    # Trainers find such losses themselves; this would wait for the device in every step.
    logging_nan_inf_filter: bool = False
    # No training changes them where processes do not agree anyway, and the items' tables are large.
    ddp_broadcast_buffers: bool | None = False
    use_cpu: bool = False

    def __post_init__(self):
        if self.eval_strategy == "steps" and self.eval_steps is None:
            # As `TrainingArguments` would, but then it would not be among the settings that a record compares.
            self.eval_steps = self.logging_steps
        # What accelerate was asked for is a setting as well, which changes what is trained.
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
        self.bf16, self.fp16 = self.bf16 or precision == "bf16", self.fp16 or precision == "fp16"
        # Before `TrainingArguments` derives values that nobody asked for.
        self.changed = changed_arguments(self)
        check_ranges(
            self,
            positive=(
                "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
                "gradient_accumulation_steps", "eval_accumulation_steps", "eval_steps", "save_steps", "logging_steps",
                "save_total_limit", "adam_epsilon",
            ),
            not_negative=(
                "learning_rate", "early_stopping_patience", "weight_decay", "warmup_steps", "seed", "data_seed",
                "max_grad_norm", "dataloader_num_workers", "eval_delay", "label_smoothing_factor",
            ),
            decay=("adam_beta1", "adam_beta2"),
        )  # fmt: skip
        if self.max_steps != -1:
            check_ranges(self, positive=("max_steps",))
        self.report_to = require_reporting(self.report_to)
        parse_links(self.hub_links)
        self._settle_best_epoch()
        # Without an accelerator TrainingArguments refuses bf16 and pins memory in vain, unless told to use the CPU.
        self.use_cpu |= parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        super().__post_init__()

    def _settle_best_epoch(self) -> None:
        """Drops what needs an evaluation where there is none, and refuses settings that contradict each other."""
        evaluates, saves = self.eval_strategy, self.save_strategy
        if evaluates == "no" and self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"--lr_scheduler_type {self.lr_scheduler_type} follows evaluations, and --eval_strategy is no; choose "
                "another scheduler, or evaluate."
            )
        if evaluates == "no":
            if self.load_best_model_at_end or self.early_stopping_patience:
                logger.warning("--eval_strategy no: the last epoch is kept, and training does not stop early.")
            self.load_best_model_at_end = False
            self.early_stopping_patience = 0
        if self.load_best_model_at_end and saves not in (evaluates, "best"):
            raise ValueError(
                f"--load_best_model_at_end true needs a checkpoint of every evaluation, and --save_strategy {saves} "
                f"does not write one where --eval_strategy {evaluates} evaluates; give both strategies the same "
                "value, or set --load_best_model_at_end false."
            )
        every = self.eval_steps or self.logging_steps
        if self.load_best_model_at_end and saves == "steps" and min(every, self.save_steps) >= 1:
            if self.save_steps % every:
                raise ValueError(
                    f"--save_steps {self.save_steps:g} is no multiple of --eval_steps {every:g}, so that checkpoints "
                    "would not be evaluated; change either, or set --load_best_model_at_end false."
                )
        uses_metric = self.load_best_model_at_end or self.early_stopping_patience or saves == "best"
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if uses_metric and not any(fnmatch.fnmatch(metric, pattern) for pattern in self.metric_names):
            raise ValueError(
                f"--metric_for_best_model {metric} is not measured; choose one of {', '.join(self.metric_names)}."
            )
        if self.greater_is_better is None:
            self.greater_is_better = not any(fnmatch.fnmatch(metric, pattern) for pattern in self.smaller_is_better)


def training_settings(training: TrainingArguments) -> dict:
    """The settings of a training, as JSON values: all that this project declares, and of those that
    [`~transformers.TrainingArguments`] declares what a paper states and what was asked for."""
    own = {argument.name for argument in fields(training)} - {argument.name for argument in fields(TrainingArguments)}
    is_ours = isinstance(training, BestEpochTrainingArguments)
    told = own | {*STATED, *(training.changed if is_ours else changed_arguments(training))}
    values = {argument.name: getattr(training, argument.name) for argument in fields(training)}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    plain = (bool, str, int, float, list, type(None))
    return {name: value for name, value in values.items() if name in told and isinstance(value, plain)}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        # Without the spelling with hyphens of every flag.
        message = re.sub(r"/--[\w-]+", "", message).removeprefix("argument ").rstrip(".")
        raise ValueError(f"{message}; see `{self.prog} --help`.")


def parse(arguments_class: type[CommandArguments], argv: list[str] | None = None):
    """As [`_parse`]; whatever flags and settings cannot be is a [`UsageError`], a `ValueError`."""
    try:
        return _parse(arguments_class, argv)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _parse(arguments_class: type[CommandArguments], argv: list[str] | None):
    """
    Reads a stage's arguments, with `config`, `training` and `changed`, from flags, or from a YAML file followed by
    flags that override it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, a flag or key is unknown or missing, or its value cannot be.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    stage = arguments_class.__name__.removesuffix("Arguments").lower()
    model_class = _model_dataclass(arguments_class)
    training_class = arguments_class.training_class
    classes = [one for one in (training_class, model_class, arguments_class) if one is not None]
    # The stage's own declarations last: they stand for those of the same name in TrainingArguments.
    parser = _Parser(classes, prog=f"mmesid {stage}", add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for action in parser._actions:
        if action.nargs == "+" and not action.required:
            action.nargs = "*"
    if arguments_class.positional is not None:
        argv = [f"--{arguments_class.positional}"] * (argv[:1] != [] and not argv[0].startswith("-")) + argv
    elif argv and argv[0].endswith((".yaml", ".yml")):
        settings = read_yaml(Path(argv[0]), "file of settings") or {}
        if not isinstance(settings, dict):
            raise ValueError(f"'{argv[0]}' holds no settings; write `flag: value`, one per line.")
        check_names(settings, {action.dest for action in parser._actions}, f"'{argv[0]}'", stage)
        argv = to_flags(settings) + argv[1:]
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and math.isnan(number) for number in numbers):
            raise ValueError(f"--{name} is not a number; correct it.")
    arguments = arguments_class(**_values_of(arguments_class, values))
    if model_class is not None:
        model = model_class(**_values_of(model_class, values))
        arguments.config = dict(vars(model))
        arguments.changed |= changed_arguments(model)
    if training_class is not None:
        arguments.training = training_class(**_values_of(training_class, values))
        arguments.changed |= arguments.training.changed
    arguments.check()
    return arguments


def _model_dataclass(arguments_class: type[CommandArguments]) -> type | None:
    """The settings of the model that a stage offers, as a dataclass that [`~transformers.HfArgumentParser`] reads."""
    if arguments_class.config_class is None:
        return None
    declared: dict = {one.name: one for one in fields(arguments_class.config_class)}
    settings = []
    for name in itertools.chain.from_iterable(arguments_class.model_settings.values()):
        hint = declared[name].type
        if isinstance(hint, types.UnionType):
            # Where the configuration takes several types, a flag's text is read as the first.
            hint = typing.get_args(hint)[0] | None
        settings.append((name, hint, field(default=declared[name].default)))
    return dataclasses.make_dataclass("ModelSettings", settings)


def _values_of(a_class: type, values: dict) -> dict:
    return {one.name: values[one.name] for one in fields(a_class) if one.init}
