"""
Fine-tunes the recommender on all prefixes of every training sequence and saves the checkpoint that ranks best on
validation.

    mmesid finetune --prepared_dir runs/quickstart/prepared --embeddings_dir runs/quickstart/embeddings \
        --quantizer_dir runs/quickstart/quantizer --output_dir runs/quickstart/recommender
    accelerate launch -m mmesid.trainer.stages.finetune --prepared_dir ... \
        --backbone_name_or_path meta-llama/Llama-3.2-1B ...
"""

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from peft.utils.error import NoMatchingPeftModuleError
from transformers import AutoTokenizer, BitsAndBytesConfig, set_seed

from mmesid.hub_cards import model_licence, save_card
from modeling_mmesid import (
    MMESIDConfig,
    MMESIDForSequentialRecommendation,
    MMESIDProcessor,
    MMRQVAEConfig,
    MMRQVAEModel,
)
from modeling_mmesid.processing_mmesid import SYSTEM_PROMPT, USER_PROMPT

from ..data.prepared import PreparedDataset
from ..data.tables import load_table, table_encoders, table_path
from ..data.windows import EvaluationHistories, TrainingWindows
from ..quantizer.evaluation import encode_items
from ..quantizer.items import ItemTables
from ..recommender.description import describe_items
from ..recommender.mmesid_trainer import MMESIDTrainer, MMESIDTrainingArguments
from ..recommender.small_llama import new_llama_config, train_tokenizer
from ..running.arguments import StageArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import early_stopping, fit, trainer_arguments


# Of a new Llama's tokenizer and layers, and of LoRA.
VOCAB_SIZE = 4096
HEAD_WIDTH = 64
ATTENTION_DROPOUT = 0.2
LORA_DROPOUT = 0.05


@dataclass(kw_only=True)
class FinetuneArguments(StageArguments):
    """
    Fine-tune the language model that reads histories and ranks the whole catalogue.

    Args:
        > Data

        prepared_dir (`str`): Directory written by `mmesid prepare`.
        embeddings_dir (`str`, *optional*): Directory of the embedding tables written by `mmesid embed`.
        quantizer_dir (`str`, *optional*): Directory written by `mmesid quantize`.
        modalities (`list[str]`, *optional*): Modalities of the quantizer that items carry; all of them by default, and
            with an empty list a free ID vector is all that an item has (the baseline).

        > Items

        paper (`bool`, *optional*, defaults to `False`): The paper's items: a token MLP and a score head, no free
            vector.
        code_initialization (`str`, *optional*, defaults to `"trained"`): Start code
            embeddings from the quantizer's code vectors, or at random (ablation).

        > Decoder

        backbone_name_or_path (`str`, *optional*): Pretrained decoder on the Hub or on disk; by default a new small
            Llama trained in full.
        backbone_revision (`str`, *optional*): Branch, tag or commit of the pretrained decoder.
        quantization (`str`, *optional*): nf4 loads the frozen weights of a pretrained decoder in four bits
            under the adapter (QLoRA), which takes the extra `qlora`.
        attn_implementation (`str`, *optional*): How a pretrained decoder attends: sdpa, flex_attention (CUDA; skips
            what packed prefixes do not see), flash_attention_2 (one prefix per row) or eager; by default the library's
            choice, and flex_attention in training on CUDA where a trial finds it to mean the same.
        hidden_size (`int`, *optional*, defaults to `128`): Width of the new Llama.
        num_hidden_layers (`int`, *optional*, defaults to `2`): Layers of the new Llama.
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

    prepared_dir: str
    embeddings_dir: str | None = None
    quantizer_dir: str | None = None
    modalities: list[str] | None = None
    paper: bool = False
    code_initialization: Literal["trained", "random"] = "trained"
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    quantization: Literal["nf4"] | None = None
    attn_implementation: str | None = None
    hidden_size: int = 128
    num_hidden_layers: int = 2
    user_prompt: str = USER_PROMPT
    lora_r: int = 8
    lora_alpha: int = 16
    lora_target_modules: list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    freeze_backbone: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("hidden_size", "num_hidden_layers", "lora_alpha"), not_negative=("lora_r",))
        if self.modalities != []:
            for name in ("embeddings_dir", "quantizer_dir"):
                if getattr(self, name) is None:
                    raise ValueError(
                        f"--{name} is not set; give the directory, or --modalities without a name for items that are "
                        "a free ID vector alone."
                    )
        if self.quantization is None:
            return
        if not self.lora_r and not self.freeze_backbone:
            raise ValueError("--quantization nf4 freezes the decoder, which --lora_r 0 trains in full; drop either.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "--quantization nf4 needs bitsandbytes, which is not installed; pip install 'mmesid[qlora]'."
            )

    def check(self, **settings) -> None:
        if self.paper:
            self.config |= {"share_item_table": False, "use_item_ids": False}
        # One modality stands for those of the quantizer.
        content = {} if self.modalities == [] else {"modalities": ["content"], "embedding_dims": [1]}
        super().check(**content, **settings)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(FinetuneArguments, argv)
    modalities = content_modalities(arguments)
    run = StageRun("finetune", arguments, inputs=_inputs(arguments, modalities))
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    set_seed(arguments.training.seed)
    settings, tables = load_content(arguments, modalities, data.num_items) if modalities else ({}, {})
    processor, model = build(arguments, data, settings)
    model.initialize_items(data.frequencies, **tables)
    run.details.update(
        data=data.statistics,
        encoders=table_encoders(arguments.embeddings_dir, modalities),
        base_model=base_model(arguments.backbone_name_or_path),
        base_model_licence=model_licence(arguments.backbone_name_or_path, arguments.backbone_revision),
    )
    with run as staging:
        trainer = MMESIDTrainer(
            model,
            trainer_arguments(arguments, run),
            num_candidates=arguments.training.num_candidates,
            flex_attention=arguments.attn_implementation is None,
            train_dataset=TrainingWindows(data.sequences("train"), model.config.max_history),
            eval_dataset=EvaluationHistories(data.sequences("validation")),
            processing_class=processor,
            callbacks=early_stopping(arguments.training),
        )
        trainer.draft_record = run.draft_record
        fit(trainer)
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
            save_card(staging, dataclasses.asdict(run.draft_record()))
    trainer.publish(arguments.output_dir)


def content_modalities(arguments: FinetuneArguments) -> list[str]:
    """The modalities that items carry: the given ones or all of the quantizer's; none for the ID-only baseline."""
    if arguments.modalities == []:
        return []
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


def _inputs(arguments: FinetuneArguments, modalities: list[str]) -> dict[str, str | list[Path]]:
    inputs = {"prepared_dir": arguments.prepared_dir}
    if modalities:
        inputs["quantizer_dir"] = arguments.quantizer_dir
        inputs["embeddings_dir"] = [table_path(arguments.embeddings_dir, modality) for modality in modalities]
    return inputs


def load_content(
    arguments: FinetuneArguments, modalities: list[str], num_items: int
) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """What items are made of: settings of [`MMESIDConfig`], and the tables of `initialize_items` by kind and
    modality."""
    quantizer = MMRQVAEModel.from_pretrained(arguments.quantizer_dir)
    loaded = {
        modality: load_table(table_path(arguments.embeddings_dir, modality), modality, num_items)
        for modality in modalities
    }
    tables = {
        "embeddings": {modality: table.embeddings for modality, table in loaded.items()},
        "present": {modality: table.present for modality, table in loaded.items()},
        "codes": encode_items(quantizer, ItemTables(loaded)),
    }
    if arguments.code_initialization == "trained":
        tables["code_vectors"] = {modality: quantizer.code_vectors(modality) for modality in modalities}
    settings = {
        "modalities": modalities,
        "embedding_dims": [table.embeddings.shape[1] for table in loaded.values()],
        "num_quantizers": quantizer.config.num_quantizers,
        "codebook_size": quantizer.config.codebook_size,
        "codebook_dim": quantizer.config.codebook_dim,
    }
    return settings, tables


def build(
    arguments: FinetuneArguments, data: PreparedDataset, content_settings: dict
) -> tuple[MMESIDProcessor, MMESIDForSequentialRecommendation]:
    """The processor and the untrained recommender around a pretrained decoder, or a new one; its items are still
    empty."""
    if arguments.backbone_name_or_path is None:
        # With the prompt as often as there are items it cuts the prompt into words: a third of the tokens to read.
        prompt = [SYSTEM_PROMPT, arguments.user_prompt]
        tokenizer = train_tokenizer([*data.texts[1:], *prompt * data.num_items], VOCAB_SIZE)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            arguments.backbone_name_or_path, revision=arguments.backbone_revision
        )
    processor = MMESIDProcessor(tokenizer, data.item_ids[1:], data.titles[1:], user_prompt=arguments.user_prompt)
    prefix_ids, suffix_ids = processor.prompt_ids()
    settings = (
        content_settings
        | arguments.config
        | {
            "num_items": data.num_items,
            "prompt_prefix_ids": prefix_ids,
            "prompt_suffix_ids": suffix_ids,
        }
    )
    if arguments.backbone_name_or_path is None:
        backbone_config = new_llama_config(
            tokenizer,
            arguments.hidden_size,
            arguments.num_hidden_layers,
            max(arguments.hidden_size // HEAD_WIDTH, 1),
            ATTENTION_DROPOUT,
            len(prefix_ids) + arguments.config["max_history"] + len(suffix_ids),
        )
        model = MMESIDForSequentialRecommendation(
            MMESIDConfig(backbone_config=backbone_config, item_token_scale=arguments.hidden_size**0.5, **settings)
        )
    else:
        try:
            model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
                arguments.backbone_name_or_path,
                lora=lora_settings(arguments),
                freeze_backbone=arguments.freeze_backbone,
                backbone_kwargs=backbone_kwargs(arguments),
                **settings,
            )
        except NoMatchingPeftModuleError as error:
            raise ValueError(
                f"'{arguments.backbone_name_or_path}' has no layer called {', '.join(arguments.lora_target_modules)}; "
                "name some of its own as --lora_target_modules, or give all-linear for every linear layer."
            ) from error
    return processor, model


def lora_settings(arguments: FinetuneArguments) -> dict | None:
    """Arguments of [`peft.LoraConfig`]; `None` for no adapter."""
    if not arguments.lora_r or arguments.freeze_backbone:
        return None
    targets = arguments.lora_target_modules
    return {
        "r": arguments.lora_r,
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": LORA_DROPOUT,
        # As a word, not in a list, it is no name of a layer to PEFT.
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
    }


def backbone_kwargs(arguments: FinetuneArguments) -> dict:
    """How `AutoModel.from_pretrained` loads the decoder."""
    kwargs = {} if arguments.backbone_revision is None else {"revision": arguments.backbone_revision}
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    if arguments.quantization is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=arguments.quantization,
            bnb_4bit_compute_dtype=torch.bfloat16 if arguments.training.bf16 else torch.float32,
        )
    return kwargs


if __name__ == "__main__":
    run_as_script("finetune", main)
