"""Model and dataset cards, written from the records of the stages."""

from .cards import render_card, save_card
from .licences import model_licence


__all__ = ["model_licence", "render_card", "save_card"]
