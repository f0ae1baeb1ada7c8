"""Model and dataset cards, written from the records of the stages."""

from .cards import CARD_NAME, EVAL_RESULTS_NAME, REPOSITORY, eval_results, render_card, save_card
from .licences import model_licence
from .subjects import require_links, subject_of


__all__ = [
    "CARD_NAME",
    "EVAL_RESULTS_NAME",
    "REPOSITORY",
    "eval_results",
    "model_licence",
    "render_card",
    "require_links",
    "save_card",
    "subject_of",
]
