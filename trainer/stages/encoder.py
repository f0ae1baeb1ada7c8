"""
Trains a dual encoder of texts and pictures on the catalogue's own pairs, from a small new CLIP or from a model that is
named; `mmesid embed --encoder dual_encoder` reads it.

    mmesid encoder --prepared_dir runs/mine/prepared --output_dir runs/mine/encoder
    mmesid encoder --prepared_dir runs/mine/prepared --output_dir runs/mine/encoder \
        --model_name_or_path openai/clip-vit-base-patch32
"""

import os
from dataclasses import dataclass, fields
from typing import Literal

from accelerate import PartialState

from ..data.prepared import PreparedDataset
from ..encoders import load_encoder
from ..encoders.dual_encoder import CLIPSizes
from ..encoders.dual_encoder_training import DualEncoderTrainingArguments, dual_encoder_trainer
from ..encoders.remote_code import refuse_unpinned_code
from ..publishing.repository import present
from ..running.arguments import ReaderArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import fit, trainer_arguments
from ..running.training_log import trackers_at_rest


SIZES = tuple(size.name for size in fields(CLIPSizes))


@dataclass(kw_only=True)
class EncoderArguments(ReaderArguments, CLIPSizes):
    """
    Train a dual encoder on the catalogue's own pairs of text and picture.

    Args:
        > Data

        caption_column (`str`, *optional*, defaults to `"text"`): The text that goes with a picture.

        > Pretrained model

        model_name_or_path (`str`, *optional*): CLIP or SigLIP model to begin with, a directory or a name on the Hub;
            by default a small new CLIP.
        revision (`str`, *optional*): Branch, tag or commit of the model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model's repository brings,
            and no other; takes a full commit hash as --revision.
    """

    training_class = DualEncoderTrainingArguments

    caption_column: Literal["title", "text"] = "text"
    model_name_or_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=SIZES)
        CLIPSizes.__post_init__(self)
        if self.model_name_or_path is not None:
            for name in set(SIZES) & set(self.changed):
                raise ValueError(
                    f"--{name} is a size of a new CLIP, not of --model_name_or_path; leave one of them out."
                )
            if self.trust_remote_code:
                refuse_unpinned_code(self.model_name_or_path, self.revision)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EncoderArguments, argv)
    inputs = {"prepared_dir": arguments.prepared_dir}
    if arguments.model_name_or_path is not None and os.path.isdir(arguments.model_name_or_path):
        inputs["model_name_or_path"] = arguments.model_name_or_path
    run = StageRun("encoder", arguments, inputs)
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    with run as staging:
        if arguments.model_name_or_path is None:
            encoder, sizes = None, {name: getattr(arguments, name) for name in SIZES}
            run.details.update(encoder="CLIP trained from scratch on the catalogue's pairs", revision=None)
        else:
            name, revision = arguments.model_name_or_path, arguments.revision
            trust_remote_code = arguments.trust_remote_code
            encoder = load_encoder("dual_encoder", name, revision=revision, trust_remote_code=trust_remote_code)
            sizes = {}
            run.details.update(encoder.details_of(name, revision), base_model=name)
        trainer = dual_encoder_trainer(
            data, trainer_arguments(arguments, run), encoder, arguments.caption_column, **sizes
        )
        run.details.update(data=data.statistics)
        trainer.draft_record = run.draft_record
        fit(trainer)
        with trackers_at_rest(trainer):
            evaluated = trainer.evaluate()
        run.metrics["held_out"] = {name: evaluated[f"eval_{name}"] for name in trainer.args.metric_names}
        run.details.update(
            training_pairs=len(trainer.train_dataset),
            held_out_pairs=len(trainer.eval_dataset),
            chance_recall_at_1=1 / len(trainer.eval_dataset),
            parameters=trainer.encoder.model.num_parameters(),
        )
        if PartialState().is_main_process:
            trainer.encoder.save_pretrained(staging)
            present(run, trainer)
    trainer.publish(arguments.output_dir)


if __name__ == "__main__":
    run_as_script("encoder", main)
