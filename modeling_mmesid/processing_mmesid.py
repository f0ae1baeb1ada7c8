"""The recommender's processor: raw item ids to rows and back, and the prompt around the items."""

import os
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from huggingface_hub.errors import HFValidationError
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import TensorType

from .packing import pack_histories


SYSTEM_PROMPT = "You are a helpful AI assistant for recommendations"
USER_PROMPT = "Given the user's purchase history, predict next possible item to be purchased. {items}"
# Stands for the items while a chat template is rendered; any text that no prompt holds.
_SLOT = "\u241fitems\u241f"


class MMESIDProcessor(ProcessorMixin):
    r"""
    Turns histories of raw item ids into the rows that [`MMESIDForSequentialRecommendation`] reads, and rows back into
    ids and titles.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The backbone's tokenizer; its chat template, where it has one, frames
            the prompt.
        item_ids (`list[str]`): Raw id of every item, in the order of rows 1 to N.
        titles (`list[str]`, *optional*): Title of every item, in the same order.
        system_prompt (`str`, *optional*): What the system turn says; the paper's sentence by default.
        user_prompt (`str`, *optional*): What the user turn says, with `{items}` where the items stand; the paper's
            sentence by default. `"{items}"` is no prompt at all: not even the chat template's own tokens.
        max_history (`int`, *optional*): Latest items of a history that tensors hold, as the model's own setting; all
            by default.

    Raises:
        ValueError: If an item id occurs twice, or if `user_prompt` does not hold `{items}` exactly once.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        item_ids: Sequence[str],
        titles: Sequence[str] | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        user_prompt: str = USER_PROMPT,
        max_history: int | None = None,
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.item_ids: list[str] = []
        self.titles: list[str] | None = None if titles is None else []
        self.system_prompt = system_prompt
        self.user_prompt = user_prompt
        self.max_history = max_history
        self._rows: dict[str, int] = {}
        self.add_items(item_ids, titles)
        require_items_place(user_prompt)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As [`~transformers.ProcessorMixin.from_pretrained`]; raises a `ValueError` if its files are damaged. Code
        that they name is refused unless `trust_remote_code` is given."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{"trust_remote_code": False} | kwargs)
        except (OSError, HFValidationError, KeyboardInterrupt, SystemExit):
            raise
        # The tokenizer's own, which are of no better class: its panics are no `Exception`.
        except BaseException as error:
            raise ValueError(
                f"The processor of '{pretrained_model_name_or_path}' cannot be read ({' '.join(str(error).split())}); "
                "save or download it again."
            ) from error

    def __call__(
        self, histories: Iterable[Iterable[str | int]], return_tensors: str | TensorType | None = None
    ) -> list[list[int]] | BatchFeature:
        """
        Turns histories into what the model reads.

        Args:
            histories (`Iterable[Iterable[str]]`): Raw item ids of each user, oldest first; an integer stands for the
                id that it is written as.
            return_tensors (`str`, *optional*): `"pt"` gives the tensors of a forward pass instead of rows.

        Returns:
            `list[list[int]]`: The rows of each history, which `recommend` takes; or with `return_tensors="pt"` a
            `BatchFeature` of the latest `max_history` of them: `input_ids` and `items`, `(batch, length)`, and
            `lengths`, `(batch,)`, padded on the right.

        Raises:
            ValueError: If a history is empty or none, an id is not in the catalogue, or other tensors are asked for.

        Example:

        ```python
        >>> users = model(**processor([["sku000007", "sku000031"]], return_tensors="pt")).user_embeddings
        >>> scores = users @ model.item_table().T  # (users, items + 1), row 0 is padding
        ```
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is '{return_tensors}'; the models read PyTorch's, 'pt'.")
        rows = []
        for index, history in enumerate(histories):
            if isinstance(history, str) or not isinstance(history, Iterable):
                raise ValueError(f"History {index} is {history!r}; give a list of item ids for each user.")
            rows.append(self.convert_item_ids_to_rows(history))
            if not rows[-1]:
                raise ValueError(f"History {index} is empty; give at least one item id, or leave the user out.")
        if return_tensors is None:
            return rows
        if not rows:
            raise ValueError("There is no history to make tensors of; give one at least.")
        return BatchFeature(pack_histories([row[-(self.max_history or 0) :] for row in rows], self.prompt_ids()[1]))

    def add_items(self, item_ids: Sequence[str], titles: Sequence[str] | None = None) -> list[int]:
        """
        Names items that were added to the model, in the order of [`~MMESIDForSequentialRecommendation.add_items`], and
        returns their rows.

        Raises:
            ValueError: If an id is already in the catalogue, or titles are missing where the others have them.
        """
        item_ids, titles = list(map(str, item_ids)), None if titles is None else list(titles)
        first = len(self.item_ids) + 1
        rows = {item_id: row for row, item_id in enumerate(item_ids, start=first)}
        for row, item_id in enumerate(item_ids, start=first):
            if item_id in self._rows or rows[item_id] != row:
                raise ValueError(f"Item id '{item_id}' occurs more than once; ids must be unique.")
        if (titles is None) != (self.titles is None) or (titles is not None and len(titles) != len(item_ids)):
            raise ValueError("Give one title for each item if the other items have titles, and none if not.")
        self.item_ids += item_ids
        if self.titles is not None:
            self.titles += titles
        self._rows |= rows
        return list(rows.values())

    def convert_item_ids_to_rows(self, item_ids: Iterable[str | int]) -> list[int]:
        """Rows of raw ids, where an integer stands for the id that it is written as; a `ValueError` names the first
        that is not in the catalogue."""
        names: list = [str(item_id) if isinstance(item_id, Integral) else item_id for item_id in item_ids]
        for name in names:
            if not isinstance(name, str) or name not in self._rows:
                raise ValueError(
                    f"Item id '{name}' is not in this model's catalogue of {len(self.item_ids)} items, whose first is "
                    f"'{self.item_ids[0]}'; correct it or leave it out."
                )
        return [self._rows[name] for name in names]

    def convert_rows_to_item_ids(self, rows: torch.Tensor | Sequence) -> list:
        """Raw ids of rows (an int, or a tensor or list nested to any depth), in the same nesting."""
        return _map_rows(rows, self.item_ids)

    def convert_rows_to_titles(self, rows: torch.Tensor | Sequence) -> list:
        """Titles of rows, in the same nesting; a `ValueError` if the processor was made without titles."""
        if self.titles is None:
            raise ValueError("This processor was saved without titles; show item ids instead.")
        return _map_rows(rows, self.titles)

    def prompt_ids(self) -> tuple[list[int], list[int]]:
        """
        Token ids of the prompt before and after the items: `prompt_prefix_ids` and `prompt_suffix_ids` of
        [`MMESIDConfig`]. The tokenizer's own chat template frames system and user turn and opens the assistant's; one
        that knows no system turn (Gemma's, Mistral's first) has its sentence open the user's. A tokenizer without a
        chat template gets the plain sentences, opened by its beginning-of-sequence token.
        """
        before, after = self.user_prompt.split("{items}")
        if not before and not after:
            return [], []
        if self.tokenizer.chat_template is not None:
            text = self._chat(f"{before}{_SLOT}{after}")
        else:
            text = f"{self.tokenizer.bos_token or ''}{self.system_prompt}\n{before}{_SLOT}{after}\n"
        return tuple(self.tokenizer(part, add_special_tokens=False).input_ids for part in text.split(_SLOT))

    def _chat(self, user_turn: str) -> str:
        def rendered(**turns: str) -> str:
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        try:
            text = rendered(system=self.system_prompt, user=user_turn)
        except Exception:  # jinja2's own, and this package does not import jinja2.
            text = None
        # Other templates drop a system turn without a word.
        if text is None or self.system_prompt.strip() not in text:
            text = rendered(user=f"{self.system_prompt}\n\n{user_turn}")
        return text


def require_items_place(user_prompt: str) -> None:
    """Raises `ValueError` unless the prompt says once where the items stand."""
    if user_prompt.count("{items}") != 1:
        raise ValueError(
            f"user_prompt must hold {{items}} exactly once, where the items stand; it is '{user_prompt}'."
        )


def _map_rows(rows, names: list[str]):
    if isinstance(rows, torch.Tensor):
        rows = rows.tolist()
    if isinstance(rows, Sequence):
        return [_map_rows(row, names) for row in rows]
    if not 1 <= rows <= len(names):
        raise ValueError(f"Row {rows} is outside 1..{len(names)}; row 0 is padding and no item.")
    return names[rows - 1]


__all__ = ["MMESIDProcessor"]
