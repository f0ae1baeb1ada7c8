"""
Fine-tunes the recommender on all prefixes of every training sequence and saves the checkpoint that ranks best on
validation.

    mmesid finetune --prepared_dir runs/quickstart/prepared --embeddings_dir runs/quickstart/embeddings \
        --quantizer_dir runs/quickstart/quantizer --output_dir runs/quickstart/recommender
    accelerate launch -m mmesid.trainer.stages.finetune --prepared_dir ... \
        --backbone_name_or_path meta-llama/Llama-3.2-1B ...
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig

from mmesid.hub_cards import model_licence
from modeling_mmesid import MMESIDConfig, MMRQVAEConfig, MMRQVAEModel, SASRecForSequentialRecommendation
from modeling_mmesid.processing_mmesid import USER_PROMPT, require_items_place

from ..data.prepared import PreparedDataset
from ..data.tables import load_table, table_encoders, table_path
from ..publishing.repository import present
from ..quantizer.semantic_ids import SEMANTIC_IDS_NAME, read_semantic_ids
from ..recommender.description import describe_items
from ..recommender.mmesid_trainer import MMESIDTrainingArguments
from ..recommender.score_weights import fit_score_weights
from ..recommender.small_llama import num_attention_heads
from ..recommender.training import LORA_TARGET_MODULES, build_recommender, finetune_trainer, training_plan
from ..running.arguments import ReaderArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun, require_exists
from ..running.training import fit, trainer_arguments
from ..running.training_log import trackers_at_rest


# What `build_recommender` takes under the same name.
BUILT_FROM = (
    "freeze_backbone", "lora_r", "lora_alpha", "lora_target_modules", "hidden_size", "num_hidden_layers",
    "user_prompt", "code_initialization",
)  # fmt: skip


# What is read only where a decoder is named.
OF_PRETRAINED = (
    "backbone_revision", "gguf_file", "quantization", "attn_implementation", "freeze_backbone", "lora_r", "lora_alpha",
    "lora_target_modules",
)  # fmt: skip

# What an item can do without, by the settings of the model.
WITHOUT: dict[str, dict] = {
    "embeddings": {"use_embeddings": False, "similarity_weights": {}},
    "codes": {"num_quantizers": 0},
    "ids": {"use_item_ids": False},
    "shared_table": {"share_item_table": False},
    "frequencies": {"fuse_by_frequency": False},
}


@dataclass(kw_only=True)
class FinetuneArguments(ReaderArguments):
    """
    Fine-tune the language model that reads histories and ranks the whole catalogue.

    Args:
        > Data

        embeddings_dir (`str`, *optional*): Directory of the embedding tables written by `mmesid embed`.
        quantizer_dir (`str`, *optional*): Directory written by `mmesid quantize`.
        sasrec_dir (`str`, *optional*): Directory written by `mmesid sasrec`: its scores are added to the decoder's.
            Not read with an empty list of modalities, nor in the paper's form.
        modalities (`list[str]`, *optional*): Modalities of the quantizer that items carry; all of them by default, and
            with an empty list a free ID vector is all that an item has (the baseline).

        > Items

        paper (`bool`, *optional*, defaults to `False`): The paper's items: a token MLP and a score head, no free
            vector.
        code_initialization (`str`, *optional*, defaults to `"trained"`): Start code embeddings from the
            quantizer's code vectors, or at random (ablation).
        without (`list[str]`, *optional*): Parts of the items that are left out (ablations): embeddings, so that codes
            are all that content gives; codes; ids, the free vectors; shared_table, so that tokens are made apart from
            what scores; frequencies, so that each source has one weight for all items.

        > Decoder

        backbone_name_or_path (`str`, *optional*): Pretrained decoder on the Hub or on disk; by default a new small
            Llama trained in full.
        backbone_revision (`str`, *optional*): Branch, tag or commit of the pretrained decoder.
        gguf_file (`str`, *optional*): GGUF file in the repository or folder of the pretrained decoder, which is
            read from it and unpacked; takes the extra `gguf`.
        quantization (`str`, *optional*): nf4 loads the frozen weights of a pretrained decoder in four bits
            under the adapter (QLoRA), which takes the extra `qlora`.
        attn_implementation (`str`, *optional*): How a pretrained decoder attends: sdpa, flex_attention (CUDA; skips
            what packed prefixes do not see), flash_attention_2 (one prefix per row) or eager; by default the library's
            choice, and flex_attention in training on CUDA where a trial finds it to mean the same.
        hidden_size (`int`, *optional*, defaults to `128`): Width of the new Llama.
        num_hidden_layers (`int`, *optional*): Layers of the new Llama, 2 by default; of a pretrained decoder its first
            so many, all by default.
        user_prompt (`str`, *optional*): What the user turn says around {items}; '{items}' alone is no prompt at all.

        > Adapter

        lora_r (`int`, *optional*, defaults to `8`): Rank of LoRA in a pretrained decoder; 0 trains the decoder in
            full.
        lora_alpha (`int`, *optional*, defaults to `16`): Scale of LoRA.
        lora_target_modules (`list[str]`, *optional*, defaults to `["gate_proj", "up_proj", "down_proj"]`): Linear
            layers that get an adapter, by name; all-linear: every one.
        freeze_backbone (`bool`, *optional*, defaults to `False`): Train the items alone, no adapter.
    """

    config_class = MMESIDConfig
    model_settings = {
        "Data": ("max_history",),
        "Items": ("token_dropout", "output_dropout"),
    }
    training_class = MMESIDTrainingArguments

    embeddings_dir: str | None = None
    quantizer_dir: str | None = None
    sasrec_dir: str | None = None
    modalities: list[str] | None = None
    paper: bool = False
    code_initialization: Literal["trained", "random"] = "trained"
    without: list[str] = field(default_factory=list)
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    gguf_file: str | None = None
    quantization: Literal["nf4"] | None = None
    attn_implementation: str | None = None
    hidden_size: int = 128
    num_hidden_layers: int | None = None
    user_prompt: str = USER_PROMPT
    lora_r: int = 8
    lora_alpha: int = 16
    lora_target_modules: list[str] = field(default_factory=lambda: list(LORA_TARGET_MODULES))
    freeze_backbone: bool = False

    def __post_init__(self):
        # Not read, and so no part of the record: a baseline and the paper's form have nothing beside the decoder.
        if self.modalities == []:
            self.embeddings_dir = self.quantizer_dir = self.sasrec_dir = None
        if self.paper:
            self.sasrec_dir = None
        super().__post_init__()
        check_ranges(self, positive=("hidden_size", "num_hidden_layers", "lora_alpha"), not_negative=("lora_r",))
        for name in self.without:
            if name not in WITHOUT:
                raise ValueError(f"--without names '{name}'; choose of {', '.join(WITHOUT)}.")
        num_attention_heads(self.hidden_size)
        require_items_place(self.user_prompt)
        if self.lora_r and not self.freeze_backbone and not self.lora_target_modules:
            raise ValueError("--lora_target_modules names no layer; name some, or set --lora_r 0 for no adapter.")
        for name in ("embeddings_dir", "quantizer_dir"):
            if self.modalities != [] and getattr(self, name) is None:
                raise ValueError(
                    f"--{name} is not set; give the directory, or --modalities without a name for items that are a "
                    "free ID vector alone."
                )
        name = self.backbone_name_or_path
        if name is not None and name.endswith(".gguf") and Path(name).is_file():
            raise ValueError(
                f"--backbone_name_or_path '{name}' is a file; give its folder, and --gguf_file {Path(name).name}."
            )
        if self.gguf_file is not None and self.quantization is not None:
            raise ValueError("--gguf_file names weights with a quantization of their own; drop --quantization nf4.")
        if self.quantization is None:
            return
        if not self.lora_r and not self.freeze_backbone:
            raise ValueError("--quantization nf4 freezes the decoder, which --lora_r 0 trains in full; drop either.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "--quantization nf4 needs bitsandbytes, which is not installed; pip install 'mmesid[qlora]'."
            )

    def unread(self) -> dict[str, str]:
        """Settings that nothing reads beside the others, and why."""
        unread = {}
        if self.modalities == [] or "codes" in self.without:
            unread["code_initialization"] = "for items without codes"
        if self.backbone_name_or_path is None:
            return unread | dict.fromkeys(OF_PRETRAINED, "without a pretrained decoder, --backbone_name_or_path")
        unread["hidden_size"] = "beside a pretrained decoder, which has a width of its own"
        if self.freeze_backbone:
            names = (
                "lora_alpha",
                "lora_target_modules",
                "backbone_learning_rate",
                *(["lora_r"] if self.lora_r else []),
            )
            unread |= dict.fromkeys(names, "beside --freeze_backbone, which trains the items alone")
        elif self.lora_r == 0:
            names = ("lora_alpha", "lora_target_modules")
            unread |= dict.fromkeys(names, "beside --lora_r 0, which trains the decoder in full")
        return unread

    def check(self, **settings) -> None:
        for name, why in self.unread().items():
            if name in self.changed:
                raise ValueError(f"--{name} has no use {why}; leave it out.")
        for name in self.without:
            self.config |= WITHOUT[name]
        if self.paper:
            self.config |= {"share_item_table": False, "use_item_ids": False, "similarity_weights": {}}
        # Before the quantizer is asked for its modalities, one stands for them.
        modalities = ["content"] if self.modalities is None else self.modalities
        super().check(modalities=modalities, embedding_dims=[1] * len(modalities), **settings)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(FinetuneArguments, argv)
    modalities = content_modalities(arguments)
    paths = {modality: table_path(arguments.embeddings_dir, modality) for modality in modalities}
    inputs: dict = {"prepared_dir": arguments.prepared_dir}
    if modalities:
        inputs |= {"quantizer_dir": arguments.quantizer_dir, "embeddings_dir": list(paths.values())}
    if arguments.sasrec_dir is not None:
        inputs["sasrec_dir"] = arguments.sasrec_dir
    run = StageRun("finetune", arguments, inputs)
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    quantizer = codes = sasrec = None
    if arguments.sasrec_dir is not None:
        sasrec = SASRecForSequentialRecommendation.from_pretrained(arguments.sasrec_dir)
    if modalities:
        quantizer = MMRQVAEModel.from_pretrained(arguments.quantizer_dir)
        if "codes" not in arguments.without:
            codes = read_semantic_ids(Path(arguments.quantizer_dir) / SEMANTIC_IDS_NAME, data.item_ids, modalities)
    model, processor = build_recommender(
        data,
        {modality: load_table(path, modality, data.num_items) for modality, path in paths.items()},
        quantizer,
        codes,
        sasrec,
        backbone=arguments.backbone_name_or_path,
        backbone_kwargs=backbone_kwargs(arguments),
        seed=arguments.training.seed,
        **{name: getattr(arguments, name) for name in BUILT_FROM},
        **arguments.config,
    )
    run.details.update(
        data=data.statistics,
        encoders=table_encoders(arguments.embeddings_dir, modalities),
        base_model=base_model(arguments.backbone_name_or_path),
        base_model_licence=model_licence(arguments.backbone_name_or_path, arguments.backbone_revision),
    )
    with run as staging:
        training = trainer_arguments(arguments, run)
        flex_attention = arguments.attn_implementation is None
        trainer = finetune_trainer(model, processor, data, training, flex_attention=flex_attention)
        trainer.draft_record = run.draft_record
        if PartialState().is_main_process:
            print(training_plan(trainer), flush=True)
        fit(trainer)
        model = trainer.model
        if data.has_targets:
            run.details["score_weights"] = fit_score_weights(model, trainer.eval_dataset)
            with trackers_at_rest(trainer):
                run.metrics["validation"] = trainer.rank()
        if PartialState().is_main_process:
            model.save_pretrained(staging)
            processor.save_pretrained(staging)
            metrics, details = describe_items(model, processor, staging)
            run.metrics.update(metrics)
            run.details.update(
                details,
                parameters=model.num_parameters(),
                trainable_parameters=model.num_parameters(only_trainable=True),
                modalities=model.config.modalities,
            )
            present(run, trainer)
    trainer.publish(arguments.output_dir)


def content_modalities(arguments: FinetuneArguments) -> list[str]:
    """The modalities that items carry: the given ones or all of the quantizer's; none for the ID-only baseline."""
    if arguments.modalities == []:
        return []
    require_exists(arguments.quantizer_dir)
    available = MMRQVAEConfig.from_pretrained(arguments.quantizer_dir).modalities
    unknown = sorted(set(arguments.modalities or []) - set(available))
    if unknown:
        raise ValueError(
            f"'{arguments.quantizer_dir}' has no modality '{unknown[0]}', only {', '.join(available)}; "
            "correct --modalities or quantize that table too."
        )
    return arguments.modalities or available


def base_model(name_or_path: str | None) -> str | None:
    """The decoder for the record: one in a folder by its whole path, which cannot be taken for a repository."""
    is_folder = name_or_path is not None and Path(name_or_path).is_dir()
    return str(Path(name_or_path).resolve()) if is_folder else name_or_path


def backbone_kwargs(arguments: FinetuneArguments) -> dict:
    """How `AutoModel.from_pretrained` loads the decoder."""
    kwargs = {
        "revision": arguments.backbone_revision,
        "gguf_file": arguments.gguf_file,
        "attn_implementation": arguments.attn_implementation,
    }
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if arguments.quantization is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=arguments.quantization,
            bnb_4bit_compute_dtype=torch.bfloat16 if arguments.training.bf16 else torch.float32,
        )
    return kwargs


if __name__ == "__main__":
    run_as_script("finetune", main)
