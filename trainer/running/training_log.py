"""What a training leaves beside its outputs: its log, its curves, and the files of trackers such as TensorBoard."""

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmesid.hub_cards.figures import draw_training

from .records import LOGS_DIR, TRAINING_LOG_NAME, to_json, write_text_atomic


# Timings differ from run to run, and are the record's to tell.
_TIMINGS = ("_runtime", "_per_second", "preparation_time", "total_flos")
# What a Trainer has among its checkpoints that is no log.
_NO_LOGS = (f"{PREFIX_CHECKPOINT_DIR}-*", "_hub", "tmp-*")
# The file of codecarbon.
EMISSIONS_NAME = "emissions.csv"


def describe_training(trainer: Trainer, directory: Path, split: str | None) -> dict:
    """Writes `training_log.json` and `figures/training.png` into the directory; `split` is what was evaluated on,
    where that is known. Returns the details (`training`, and `energy` where codecarbon measured) for the record;
    nothing of a trainer that has not trained."""
    if trainer.state.global_step == 0:
        return {}
    log = training_log(trainer) | {"split": split}
    write_text_atomic(directory / TRAINING_LOG_NAME, to_json(log))
    draw_training(directory / "figures" / "training.png", log)
    details = {"training": {name: value for name, value in log.items() if name != "history"}}
    emissions = Path(trainer.args.output_dir) / EMISSIONS_NAME
    return details | ({"energy": _energy(emissions)} if emissions.is_file() else {})


def keep_logs(checkpoints: Path, directory: Path) -> None:
    """Copies what trackers wrote among the checkpoints, which are removed, to `logs/` in the directory."""
    ignored = shutil.ignore_patterns(*_NO_LOGS)
    names = [path.name for path in checkpoints.iterdir()]
    if set(names) - ignored(str(checkpoints), names):
        shutil.copytree(checkpoints, directory / LOGS_DIR, ignore=ignored)


def training_log(trainer: Trainer) -> dict:
    """
    The history of a training, and which of its evaluations was best.

    Returns:
        `dict`: `epochs` and `steps` that were run, `planned_epochs`; `metric`, by which the evaluations were compared,
        `greater_is_better`, `best_epoch` and `best_value` (each `None` without an evaluation); `kept`, the epoch whose
        weights are the result: and `history`, one entry per step that was logged or evaluated: `step`, `epoch`,
        `loss`, `learning_rate`, what else the trainer logs, and in `evaluation` the metrics on held-out data.
    """
    state, args = trainer.state, trainer.args
    entries: dict[int, dict] = {}
    for entry in state.log_history:
        if "train_runtime" in entry:
            # The training ends here: a later evaluation is of the best epoch, not of the last.
            break
        row = entries.setdefault(entry["step"], {"step": entry["step"], "epoch": entry.get("epoch")})
        for name, value in entry.items():
            if name.endswith(_TIMINGS) or name in ("step", "epoch"):
                continue
            if name.startswith("eval_"):
                row.setdefault("evaluation", {})[name.removeprefix("eval_")] = value
            else:
                row[name] = value
    history = list(entries.values())
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    # Not one that is NaN, which is not even equal to itself.
    evaluated = [
        row for row in history if (value := row.get("evaluation", {}).get(metric)) is not None and value == value
    ]
    # The first of equals, as the Trainer chooses.
    choose = max if args.greater_is_better else min
    best = choose(evaluated, key=lambda row: row["evaluation"][metric], default=None)
    kept = state.epoch
    if best is not None and args.load_best_model_at_end and not trainer.is_in_train:
        kept = best["epoch"]
    return {
        "epochs": state.epoch,
        "planned_epochs": float(state.num_train_epochs),
        "steps": state.global_step,
        "metric": metric if best else None,
        "greater_is_better": bool(args.greater_is_better) if best else None,
        "best_epoch": best and best["epoch"],
        "best_value": best and best["evaluation"][metric],
        "kept_epoch": kept,
        "history": history,
    }


@contextmanager
def trackers_at_rest(trainer: Trainer) -> Iterator[None]:
    """Keeps an evaluation after the training from trackers, which would begin a run of its own for it."""
    handler = trainer.callback_handler
    trackers = tuple(INTEGRATION_TO_CALLBACK.values())
    before = handler.callbacks
    handler.callbacks = [callback for callback in before if not isinstance(callback, trackers)]
    try:
        yield
    finally:
        handler.callbacks = before


def _energy(path: Path) -> dict:
    """What codecarbon measured, in all runs of a training that was resumed: `kwh`, `co2_kg`, `location`."""
    with open(path, encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    return {
        "kwh": sum(float(run["energy_consumed"]) for run in runs),
        "co2_kg": sum(float(run["emissions"]) for run in runs),
        "location": runs[-1]["country_name"] or None,
    }
