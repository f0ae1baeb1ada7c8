"""`push_to_hub` of the trainers: what `mmesid push` sends, from a training that goes on or has ended."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from mmesid.hub_cards import require_links

from ..running.arguments import BestEpochTrainingArguments, changed_arguments, parse_links, training_settings
from ..running.records import StageRecord, digests_below, unstaged_record, without_presentation
from ..running.training_log import describe_training
from .architecture import architecture
from .repository import publication, save_record, upload


# In a checkpoint: pickles of any objects, and a state with paths of this machine.
PRIVATE_STATE = ("*.bin", TRAINER_STATE_NAME)
# What else a Trainer keeps there to go on from.
TRAINING_STATE = (*PRIVATE_STATE, "*.pt", "*.pth", "global_step*", "latest", "pytorch_model_fsdp*")
# Where a published checkpoint holds the weights that `load_best_model_at_end` would load.
BEST_NAME = "best"


class _PublishedBest(TrainerCallback):
    """Tells the state where the best weights so far are: a published checkpoint does not say where they were."""

    def __init__(self, checkpoint: str):
        self.best = Path(checkpoint) / BEST_NAME

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_model_checkpoint is None and self.best.is_dir():
            state.best_model_checkpoint = str(self.best)


class HubTrainerMixin:
    """
    For trainers whose `push_to_hub` and `hub_strategy` publish what `mmesid push` does: weights, configuration, code
    and processor with the card and the results of the evaluations so far.

    The strategies `"checkpoint"` and `"all_checkpoints"` add the checkpoint of the training, as `last-checkpoint/`
    or as `checkpoint-<step>/`, with the best weights so far in `best/`, but without `training_args.bin`, which is a
    pickle of any objects, and without paths. A training that takes
    `resume_from_checkpoint=f"{snapshot_download(repo_id)}/last-checkpoint"` ends with the weights of the one that
    published it.
    """

    stage: str
    # What the metrics of `evaluate` are called in the stage's record.
    evaluation_name = "validation"
    # What a stage knows of the run, set by the stage. Without it the card says what the arguments tell.
    draft_record: Callable[[], StageRecord] | None = None
    # Related repositories that the cards link to, by kind; those of `args` to begin with.
    hub_links: dict[str, str] | None = None

    def __init__(self, *args, **kwargs):
        self._start = time.perf_counter()
        # Metrics by the split that they were measured on.
        self.measured: dict[str, dict[str, float]] = {}
        super().__init__(*args, **kwargs)
        if isinstance(self.args, BestEpochTrainingArguments):
            self.hub_links = parse_links(self.args.hub_links)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As [`~transformers.Trainer.init_hf_repo`]; refuses to publish checkpoints of DeepSpeed or FSDP."""
        if self._publishes_checkpoints() and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"hub_strategy '{self.args.hub_strategy.value}' would publish the checkpoints of DeepSpeed or FSDP, "
                "which are pickles of any objects; set it to 'every_save' or 'end'."
            )
        super().init_hf_repo(token=token, private=private)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As [`~transformers.Trainer.train`]; a published checkpoint brings the best weights so far."""
        if isinstance(resume_from_checkpoint, str):
            self.add_callback(_PublishedBest(resume_from_checkpoint))
        # What was measured so far was measured of other weights.
        self.measured = {}
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`]; the card tells the metrics under the name of what they were measured
        on, and leaves them out where that is not known."""
        self.measured = self._measured_so_far()
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        name = self.split_of(self.eval_dataset if eval_dataset is None else eval_dataset)
        if name is not None:
            self.measured[name] = without_timings(metrics)
        return metrics

    def split_of(self, dataset) -> str | None:
        """What the record calls the metrics of a dataset; `None` if that is not known."""
        return self.evaluation_name if dataset is self.eval_dataset else None

    def evaluated_on(self) -> str | None:
        """What the evaluations in training were of; `None` if that is not known."""
        return self.split_of(self.eval_dataset)

    def architecture(self) -> dict:
        """What the model is, in the rows of the card."""
        return architecture(self.accelerator.unwrap_model(self.model))

    def describe(self, directory: Path) -> tuple[dict, dict]:
        """Writes what belongs beside the weights into the directory; returns metrics and details for the record."""
        return {}, {}

    def create_model_card(self, **kwargs) -> None:
        """Writes the card of this project to `args.output_dir`; what
        [`~transformers.Trainer.create_model_card`] is told in `kwargs` the record of the run says."""
        if self.is_world_process_zero():
            directory = Path(self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self._complete(directory)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        links: dict[str, str] | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        As [`~transformers.Trainer.push_to_hub`], with the files of `mmesid push`.

        Args:
            links (`dict[str, str]`, *optional*): Related repositories that this card and later ones link to, by kind:
                `{"dataset": "me/my-dataset"}`. Defaults to `hub_links`.
            **kwargs: Not looked at: the record of the run says all that is on the card.
        """
        if links is not None:
            self.hub_links = require_links(links)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        # It reads from the directory that is made anew.
        self._finish_current_push()
        directory = self._hub_directory()
        # On all processes, which may hold parts of the model each.
        self.save_model(str(directory), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        (directory / TRAINING_ARGS_NAME).unlink()
        self._complete(directory)
        return self._send(directory, blocking, commit_message=commit_message, token=token, revision=revision)

    def publish(self, directory: str) -> None:
        """Sends the directory of the finished stage, if `args.push_to_hub` asks for it."""
        if self.args.push_to_hub and self.is_world_process_zero():
            self._finish_current_push()
            commit = self._send(Path(directory))
            print(f"{self.stage}: wrote {commit.commit_url}", flush=True)

    def _publishes_checkpoints(self) -> bool:
        return self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Every process writes its own random numbers.
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.args.hub_always_push and not self.push_in_progress.is_done():
            return
        # Its files would change while they are sent.
        self._finish_current_push()
        # A copy: the checkpoint may be rotated out before it is sent.
        directory = self._hub_directory()
        shutil.copytree(checkpoint_folder, directory, ignore=shutil.ignore_patterns(*TRAINING_STATE))
        if self._publishes_checkpoints():
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            self._copy_checkpoint(checkpoint_folder, directory / name)
        self._complete(directory)
        job = self._send(directory, False, commit_message=f"Training in progress, step {self.state.global_step}")
        # A list, whatever the annotation says.
        self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]

    def _copy_checkpoint(self, checkpoint: str, target: Path) -> None:
        """Copies what [`~transformers.Trainer.train`] resumes from, and others may read."""
        shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(*PRIVATE_STATE))
        dataclasses.replace(self.state, best_model_checkpoint=None).save_to_json(str(target / TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            (target / BEST_NAME).mkdir()
            for path in Path(best).glob("model*.safetensors*"):
                shutil.copyfile(path, target / BEST_NAME / path.name)

    def _hub_directory(self) -> Path:
        directory = Path(self.args.output_dir) / "_hub"
        if self.is_world_process_zero():
            shutil.rmtree(directory, ignore_errors=True)
        return directory

    def _complete(self, directory: Path) -> None:
        """Makes a directory with model and processor into one like a stage's."""
        metrics, details = self.describe(directory)
        details |= describe_training(self, directory, self.evaluated_on())
        if self.draft_record is not None:
            record = self.draft_record()
        else:
            record = unstaged_record(self.stage, changed_arguments(self.args), time.perf_counter() - self._start)
            record.details["settings"] = without_presentation(training_settings(self.args))
        # Not in place: the stage's own metrics and details are those of its draft.
        record = dataclasses.replace(
            record,
            outputs=digests_below(directory, directory.name),
            metrics=record.metrics | self._measured_so_far() | metrics,
            details={
                "architecture": self.architecture(),
                "parameters": self.model.num_parameters(),
            }
            | record.details
            | details
            | {"links": self.hub_links or {}},
        )
        save_record(directory, record)

    def _measured_so_far(self) -> dict[str, dict]:
        """Metrics by split; at first those that a resumed training logged before."""
        logged = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        if self.measured or not logged:
            return self.measured
        return {self.split_of(self.eval_dataset) or self.evaluation_name: without_timings(logged[-1])}

    def _send(self, directory: Path, blocking: bool = True, **settings):
        """Uploads a directory like a stage's, now or in the background."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repo_type, files = publication(directory, self.hub_model_id)
        defaults = {
            "private": self.args.hub_private_repo,
            "revision": self.args.hub_revision,
            "commit_message": "End of training",
            "token": self.args.hub_token,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        send = partial(upload, files, self.hub_model_id, repo_type, **defaults | given)
        return send() if blocking else hf_api().run_as_future(send)


def without_timings(metrics: dict[str, float]) -> dict[str, float]:
    """What an evaluation measured, without the prefix of its names and without its timings."""
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "preparation_time"))
    }
