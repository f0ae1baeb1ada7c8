"""`pipeline("sequential-recommendation")`: raw item ids in, recommended items out."""

import os
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from numbers import Integral
from typing import Any

from transformers import Pipeline

from .checkpoints import add_companions, require_public_base_model


TASK = "sequential-recommendation"
BATCH_SIZE = 256
# What a call, or the pipeline for all calls, passes on to `recommend`.
SETTINGS = ("top_k", "exclude_history", "allowed_items", "denied_items", "return_contributions")


class SequentialRecommendationPipeline(Pipeline):
    """
    Recommends items from histories of raw item ids, with a [`MMESIDForSequentialRecommendation`] and its
    [`MMESIDProcessor`].

    ```python
    >>> from transformers import pipeline
    >>> import modeling_mmesid  # registers the task; elsewhere `trust_remote_code=True` takes the repository's code

    >>> recommender = pipeline("sequential-recommendation", model="runs/quickstart/recommender")
    >>> recommender(["sku000007", "sku000031"], top_k=1)
    [{'item_id': 'sku000012', 'title': 'Veldt Fipata red checked enamel mug', 'score': 7.31,
      'contributions': {'id': 4.02, 'text': 2.1, 'visual': 1.19}}]
    ```

    Calls take a history, a list of item ids (oldest first), and return a list of items, best first; or a list of
    histories, and return one list per user; or a generator of histories, and return a generator that reads
    `batch_size` of them at a time. An item is a dictionary of `item_id`, `title` (`None` if the processor has
    no titles), `score` and `contributions`, which split the score by its sources.

    Args:
        top_k (`int`, *optional*, defaults to `10`): Items to return for each user.
        exclude_history (`bool`, *optional*, defaults to `True`): Never return an item of the user's own history.
        allowed_items (`list[str]`, *optional*): Ids of the items to choose from; the whole catalogue by default.
        denied_items (`list[str]`, *optional*): Ids of items never to return.
        return_contributions (`bool`, *optional*, defaults to `True`): Whether items have `contributions`.
        batch_size (`int`, *optional*, defaults to `256`): Users at a time.

    Raises:
        ValueError: If an item id is not in the catalogue, or fewer than `top_k` items are left to recommend.
    """

    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_processor = True

    def __call__(
        self, histories: Iterable[str] | Iterable[Iterable[str]], batch_size: int | None = None, **kwargs
    ) -> list[dict] | list[list[dict]] | Iterator[list[dict]]:
        if isinstance(histories, Iterator):
            return self._one_by_one(histories, batch_size or self._batch_size or BATCH_SIZE, kwargs)
        if isinstance(histories, str) or not isinstance(histories, Sized):
            raise ValueError(f"The pipeline got {histories!r}; give a list of item ids, or a list of such lists.")
        histories = list(histories)
        if not histories:
            return []
        one_user = isinstance(histories[0], str | Integral)
        # All users are one input to the base class: `recommend` makes the batches itself.
        inputs = {"histories": [histories] if one_user else histories, "batch_size": batch_size or self._batch_size}
        recommended = super().__call__(inputs, **kwargs)
        return recommended[0] if one_user else recommended

    def _one_by_one(self, histories: Iterator, batch_size: int, settings: dict) -> Iterator[list[dict]]:
        while batch := list(islice(histories, batch_size)):
            if isinstance(batch[0], str | Integral):
                raise ValueError("The generator gives item ids; let it give a list of them for each user.")
            recommended: Any = self(batch, batch_size, **settings)
            yield from recommended

    def _sanitize_parameters(self, **settings) -> tuple[dict, dict, dict]:
        unknown = sorted(settings.keys() - SETTINGS)
        if unknown:
            raise TypeError(f"The pipeline has no setting '{unknown[0]}'; it has {', '.join(SETTINGS)}.")
        return {}, {name: value for name, value in settings.items() if value is not None}, {}

    def preprocess(self, inputs: dict) -> dict:
        return {"rows": self.processor(inputs["histories"]), "batch_size": inputs["batch_size"] or BATCH_SIZE}

    def _forward(self, model_inputs: dict, **settings) -> dict:
        for name in ("allowed_items", "denied_items"):
            if name in settings:
                ids = settings[name]
                if isinstance(ids, str) or not isinstance(ids, Iterable):
                    raise ValueError(f"{name} is {ids!r}; give a list of item ids.")
                settings[name] = self.processor.convert_item_ids_to_rows(ids)
        settings = {"return_contributions": True} | settings
        best = self.model.recommend(model_inputs["rows"], batch_size=model_inputs["batch_size"], **settings)
        return {"rows": best.items, "scores": best.scores, "contributions": best.contributions}

    def postprocess(self, model_outputs: dict) -> list[list[dict]]:
        rows = model_outputs["rows"]
        item_ids = self.processor.convert_rows_to_item_ids(rows)
        titles = self.processor.convert_rows_to_titles(rows) if self.processor.titles is not None else None
        scores = model_outputs["scores"].tolist()
        parts = {name: values.tolist() for name, values in (model_outputs["contributions"] or {}).items()}

        def described(user: int, place: int) -> dict:
            title = None if titles is None else titles[user][place]
            item = {"item_id": item_ids[user][place], "title": title, "score": scores[user][place]}
            contributions = {name: values[user][place] for name, values in parts.items()}
            return item | {"contributions": contributions} if parts else item

        return [[described(user, place) for place in range(rows.shape[1])] for user in range(rows.shape[0])]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves model, processor and code, from which [`~transformers.pipeline`] makes the same pipeline."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As `push_to_hub` of [`MMESIDForSequentialRecommendation`], with the processor."""
        require_public_base_model(self.model.config.base_model_name_or_path)
        return super().push_to_hub(repo_id, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        add_companions(working_dir, self.model.name_or_path, repo_id)
        kwargs["commit_message"] = kwargs.get("commit_message") or "Upload model"
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


__all__ = ["SequentialRecommendationPipeline"]
