"""Model and dataset cards, written from the records of the stages."""

from .cards import render_card, save_card


__all__ = ["render_card", "save_card"]
