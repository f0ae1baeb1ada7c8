"""Recommendations from an exported user encoder and a FAISS index: neither mmesid nor transformers is loaded."""

from pathlib import Path

import faiss
import pyarrow.parquet as pq
import torch


class Retrieval:
    """
    Args:
        index_dir (`str` or `Path`): Directory written by `mmesid index`.
        users_file (`str` or `Path`): File written by `export_users.py`.
    """

    def __init__(self, index_dir: str | Path, users_file: str | Path):
        self.index = faiss.read_index(str(Path(index_dir) / "items.faiss"))
        self.items = pq.read_table(Path(index_dir) / "items.parquet").to_pylist()
        self.rows = {item["item_id"]: item["row"] for item in self.items}
        settings = {"max_history": ""}
        self.encoder = torch.export.load(str(users_file), extra_files=settings).module()
        self.max_history = int(settings["max_history"])

    @torch.no_grad()
    def recommend(self, history: list[str], count: int = 10) -> list[dict]:
        """The best items after a history of raw item ids, oldest first, without those of the history; a `ValueError`
        says what is wrong with it."""
        if not history:
            raise ValueError("The history is empty; give at least one item id.")
        unknown = [item_id for item_id in history if item_id not in self.rows]
        if unknown:
            raise ValueError(f"Item id '{unknown[0]}' is not in the index; leave it out of the history.")
        rows = torch.tensor([[self.rows[item_id] for item_id in history[-self.max_history :]]])
        wanted = min(count + len(set(history)), len(self.items))
        scores, places = self.index.search(self.encoder(rows).float().numpy(), wanted)
        found = [
            self.items[place] | {"score": float(score)} for score, place in zip(scores[0], places[0]) if place >= 0
        ]
        return [item for item in found if item["item_id"] not in history][:count]
