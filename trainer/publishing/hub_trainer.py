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

from mmesid.hub_cards import require_links, save_card

from ..running.arguments import BestEpochTrainingArguments, changed_arguments, parse_links
from ..running.records import StageRecord, digests_below, unstaged_record
from .repository import publication, save_record, upload


# What a Trainer keeps in a checkpoint to go on from: pickles, and a state with paths of this machine.
TRAINING_STATE = ("*.pt", "*.pth", "*.bin", TRAINER_STATE_NAME, "global_step*", "latest", "pytorch_model_fsdp*")
# Those of them that hold tensors and numbers, which `resume_from_checkpoint` reads with `weights_only`.
RESUMABLE_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
# Where a published checkpoint holds the weights that `load_best_model_at_end` would load, if not its own.
BEST_NAME = "best"


class _PublishedBest(TrainerCallback):
    """Tells the state where the best weights so far are: a published checkpoint does not say where they were."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        is_best = state.best_global_step == state.global_step
        best = self.checkpoint if is_best else self.checkpoint / BEST_NAME
        if state.best_model_checkpoint is None and state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)


class HubTrainerMixin:
    """
    For trainers whose `push_to_hub` and `hub_strategy` publish what `mmesid push` does: weights, configuration, code
    and processor with the card and the results of the evaluations so far.

    The strategies `"checkpoint"` and `"all_checkpoints"` add the checkpoint of the training, as `last-checkpoint/`
    or as `checkpoint-<step>/`: the state of optimizer, scheduler, random numbers and Trainer, without
    `training_args.bin`, which is a pickle of any objects, and without paths. A training that takes
    `resume_from_checkpoint=f"{snapshot_download(repo_id)}/last-checkpoint"` ends with the weights of the one that
    published it; for `load_best_model_at_end` the checkpoint brings the best weights so far in `best/`, unless they
    are its own.

    Attributes:
        stage (`str`): The stage that the trainer belongs to.
        evaluation_name (`str`): What the metrics of `evaluate` are called in the stage's record.
        draft_record (`Callable[[], StageRecord]`, *optional*): What a stage knows of the run; set by
            the stage. Without one the card says what the arguments tell.
        hub_links (`dict[str, str]`, *optional*): Related repositories that the cards link to, by kind; those of
            `args` to begin with.
    """

    stage: str
    evaluation_name: str = "validation"
    draft_record: Callable[[], StageRecord] | None = None
    hub_links: dict[str, str] | None = None

    def __init__(self, *args, **kwargs):
        self._start = time.perf_counter()
        super().__init__(*args, **kwargs)
        if isinstance(self.args, BestEpochTrainingArguments):
            self.hub_links = parse_links(self.args.hub_links)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        As [`~transformers.Trainer.init_hf_repo`].

        Raises:
            ValueError: If `hub_strategy` asks to publish checkpoints of DeepSpeed or FSDP.
        """
        if self._publishes_checkpoints() and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"hub_strategy '{self.args.hub_strategy.value}' would publish the checkpoints of DeepSpeed or FSDP, "
                "which are pickles of any objects; set it to 'every_save' or 'end'."
            )
        super().init_hf_repo(token=token, private=private)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As [`~transformers.Trainer.train`]; a published checkpoint brings the best weights so far."""
        if isinstance(resume_from_checkpoint, str):
            self.add_callback(_PublishedBest(Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def describe(self, directory: Path) -> tuple[dict, dict]:
        """Writes what belongs beside the weights into the directory; returns metrics and details for the record."""
        return {}, {}

    def create_model_card(self, **kwargs) -> None:
        """Writes the card of this project to `args.output_dir`. The arguments of
        [`~transformers.Trainer.create_model_card`] are not looked at: the record of the run says all of it."""
        if self.is_world_process_zero():
            directory = Path(self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_card(directory, dataclasses.asdict(self._record(directory, {}, {})))

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
            **kwargs: Not looked at, see [`~HubTrainerMixin.create_model_card`].
        """
        if links is not None:
            self.hub_links = require_links(links)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
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
        send = self._upload_of(directory, commit_message, token, revision)
        return send() if blocking else hf_api().run_as_future(send)

    def publish(self, directory: str) -> None:
        """Sends the directory of the finished stage, if `args.push_to_hub` asks for it."""
        if self.args.push_to_hub and self.is_world_process_zero():
            self._finish_current_push()
            commit = self._upload_of(Path(directory), "End of training")()
            print(f"{self.stage}: wrote {commit.commit_url}", flush=True)

    def _publishes_checkpoints(self) -> bool:
        return self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._publishes_checkpoints():
            # Every process writes its own random numbers.
            self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            # Its files would change while they are sent.
            self.push_in_progress.wait_until_done()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # A copy: the checkpoint may be rotated out before it is sent.
        directory = self._hub_directory()
        shutil.copytree(checkpoint_folder, directory, ignore=shutil.ignore_patterns(*TRAINING_STATE))
        if self._publishes_checkpoints():
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            self._copy_checkpoint(Path(checkpoint_folder), directory / name)
        self._complete(directory)
        message = f"Training in progress, step {self.state.global_step}"
        job = hf_api().run_as_future(self._upload_of(directory, message))
        # A list, whatever the annotation says.
        self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]

    def _copy_checkpoint(self, checkpoint: Path, target: Path) -> None:
        """Copies what [`~transformers.Trainer.train`] resumes from, and others may read."""
        shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(*TRAINING_STATE))
        for pattern in RESUMABLE_STATE:
            for path in checkpoint.glob(pattern):
                shutil.copyfile(path, target / path.name)
        state = dataclasses.replace(self.state, best_model_checkpoint=None)
        state.save_to_json(str(target / TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and not checkpoint.samefile(best):
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
        save_record(directory, self._record(directory, *self.describe(directory)))

    def _upload_of(
        self, directory: Path, commit_message: str | None, token: str | None = None, revision: str | None = None
    ) -> Callable[[], CommitInfo]:
        """The upload of a directory like a stage's, to be called now or in the background."""
        repo_type, files = publication(directory, self.hub_model_id)
        return partial(
            upload,
            files,
            self.hub_model_id,
            repo_type,
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
            token=token or self.args.hub_token,
        )

    def _record(self, directory: Path, metrics: dict, details: dict) -> StageRecord:
        if self.draft_record is not None:
            record = self.draft_record()
        else:
            record = unstaged_record(self.stage, changed_arguments(self.args), time.perf_counter() - self._start)
        evaluated = self._latest_evaluation()
        return dataclasses.replace(
            record,
            outputs=digests_below(directory, directory.name),
            metrics=record.metrics | ({self.evaluation_name: evaluated} if evaluated else {}) | metrics,
            details={"parameters": self.model.num_parameters()}
            | record.details
            | details
            | {"links": self.hub_links or {}},
        )

    def _latest_evaluation(self) -> dict[str, float]:
        """The metrics of the last evaluation, without its timings."""
        entries = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        return {
            name.removeprefix("eval_"): value
            for name, value in (entries[-1] if entries else {}).items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "preparation_time"))
        }
