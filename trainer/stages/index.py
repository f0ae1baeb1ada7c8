"""
Writes the items of a recommender as a FAISS index of inner products, for retrieval at scale or outside of Python.

    mmesid index --model_dir runs/quickstart/recommender --output_dir runs/quickstart/index
    mmesid index --model_dir runs/quickstart/recommender --output_dir runs/quickstart/index --kind hnsw

`items.parquet` says which item stands at which place of `items.faiss`. Both load with `datasets`, and a query is a
user of the model:

    items = datasets.Dataset.from_parquet("runs/quickstart/index/items.parquet")
    items.load_faiss_index("vector", "runs/quickstart/index/items.faiss")
    user = model.encode_histories(processor([history]))[0].detach().numpy()
    scores, best = items.get_nearest_examples("vector", user, k=10)  # best["item_id"], best["title"]
"""

import importlib.util
from dataclasses import dataclass
from typing import Literal

import datasets
import torch
from accelerate import PartialState

from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor

from ..running.arguments import DeviceArguments, StageArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun


INDEX_NAME = "vector"
# A thousand users who have bought one item: enough to tell a recall of .95 from one of .97.
QUERIES = 1000
RECALL_AT = 10


@dataclass(kw_only=True)
class IndexArguments(StageArguments, DeviceArguments):
    """
    Write the items of a recommender as a FAISS index of inner products.

    Args:
        > Data

        model_dir (`str`): Directory written by `mmesid finetune`.

        > Index

        kind (`str`, *optional*, defaults to `"exact"`): exact: the ranking of `recommend`; hnsw:
            a graph, close to it and faster at scale.
        hnsw_links (`int`, *optional*, defaults to `32`): hnsw: neighbours that an item is linked to.
        hnsw_construction_width (`int`, *optional*, defaults to `200`): hnsw: candidates among which an item's
            neighbours are sought.
        hnsw_search_width (`int`, *optional*, defaults to `128`): hnsw: candidates that a query keeps; more find more
            and take longer.
    """

    model_dir: str
    kind: Literal["exact", "hnsw"] = "exact"
    hnsw_links: int = 32
    hnsw_construction_width: int = 200
    hnsw_search_width: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("hnsw_links", "hnsw_construction_width", "hnsw_search_width"))


def main(argv: list[str] | None = None) -> None:
    arguments = parse(IndexArguments, argv)
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("The stage index needs FAISS, which is not installed; pip install 'mmesid[index]'.")
    # Before anything else asks for the state of this process.
    device = PartialState(cpu=arguments.use_cpu).device
    run = StageRun("index", arguments, inputs={"model_dir": arguments.model_dir})
    if run.is_up_to_date():
        return
    model = MMESIDForSequentialRecommendation.from_pretrained(arguments.model_dir).to(device)
    processor = MMESIDProcessor.from_pretrained(arguments.model_dir)
    with run as staging:
        items, rows = indexed_items(model, processor, arguments)
        run.metrics[f"recall@{RECALL_AT}"] = recall(model, items, rows)
        run.details.update(items=len(items), dimension=model.item_table().shape[1], kind=arguments.kind)
        items.save_faiss_index(INDEX_NAME, staging / "items.faiss")
        items.drop_index(INDEX_NAME)
        items.to_parquet(staging / "items.parquet")


@torch.no_grad()
def indexed_items(
    model: MMESIDForSequentialRecommendation, processor: MMESIDProcessor, arguments: IndexArguments
) -> tuple[datasets.Dataset, torch.Tensor]:
    """The items that can be recommended, as columns `row`, `item_id` and, if the processor knows them, `title`, with
    the index of their vectors; and the same rows as a tensor of shape `(indexed items,)`."""
    import faiss

    rows = torch.arange(1, model.config.num_items + 1)
    rows = rows[~model.removed_items[1:].cpu()]
    columns = {"row": rows.tolist(), "item_id": processor.convert_rows_to_item_ids(rows)}
    if processor.titles is not None:
        columns["title"] = processor.convert_rows_to_titles(rows)
    items = datasets.Dataset.from_dict(columns)
    vectors = model.item_table()[rows.to(model.device)].float().cpu().numpy()
    if arguments.kind == "exact":
        index = faiss.IndexFlatIP(vectors.shape[1])
    else:
        index = faiss.IndexHNSWFlat(vectors.shape[1], arguments.hnsw_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = arguments.hnsw_construction_width
        index.hnsw.efSearch = arguments.hnsw_search_width
    items.add_faiss_index_from_external_arrays(vectors, INDEX_NAME, custom_index=index)
    return items, rows


@torch.no_grad()
def recall(model: MMESIDForSequentialRecommendation, items: datasets.Dataset, rows: torch.Tensor) -> float:
    """Share of the exact top `RECALL_AT` that the index finds, for users with one item in their history."""
    queries = rows[torch.linspace(0, len(rows) - 1, min(QUERIES, len(rows))).long()]
    k = min(RECALL_AT, len(rows))
    table, found, users_at_once = model.item_table()[rows.to(model.device)], 0, 256
    for batch in queries.split(users_at_once):
        users = model.encode_histories(batch[:, None].tolist())
        exact = (users.to(table.dtype) @ table.T).topk(k).indices.cpu()
        approximate = torch.tensor(items.search_batch(INDEX_NAME, users.float().cpu().numpy(), k=k).total_indices)
        found += int((exact[:, :, None] == approximate[:, None, :]).sum())
    return found / (len(queries) * k)


if __name__ == "__main__":
    run_as_script("index", main)
