"""The page itself: what happens on a click. The only file that needs Gradio."""

from collections.abc import Callable

import gradio as gr

from mmesid.hub_cards.report import source_label

from .cards import STYLE, Cards
from .showcase import Showcase


FOUND, KIN = 18, 6
# A click anywhere on an item's button sends the item, and what to do with it.
CLICKS = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('button[data-row]');
    if (!button) return;
    trigger('select', {row: Number(button.dataset.row), action: button.dataset.action});
    if (button.dataset.action === 'kin')
        setTimeout(() => document.getElementById('kin').scrollIntoView({behavior: 'smooth'}), 700);
});
"""


def build_page(showcase: Showcase, name: str, is_synthetic: bool = False, top_k: int = 10) -> gr.Blocks:
    """
    The page for a recommender; `launch(css=STYLE)` shows it.

    Args:
        showcase ([`Showcase`]): The recommender.
        name (`str`): What the page calls it.
        is_synthetic (`bool`, *optional*, defaults to `False`): Whether to say that its data are generated.
        top_k (`int`, *optional*, defaults to `10`): Items that are recommended.
    """
    cards = Cards(showcase)
    empty = "Nothing yet. Choose what a user has bought, read or watched, oldest first."

    def in_a_sentence(show: Callable[..., str], *arguments) -> str:
        try:
            return show(*arguments)
        except ValueError as error:
            return cards.sentence(str(error))

    def found(words: str) -> str:
        return in_a_sentence(lambda: cards.items(showcase.search(words, FOUND), "add", "Add to the history:"))

    def ranked(history: list[int], sources: list[str]) -> str:
        return in_a_sentence(lambda: cards.ranking(showcase.recommend(history, sources, top_k), history))

    def shown(history: list[int], sources: list[str], said: str = "") -> tuple:
        items = cards.items(history, "remove", "Take out of the history:", empty)
        return history, items, ranked(history, sources) if history else "", said

    def clicked(history: list[int], sources: list[str], event: gr.EventData) -> tuple:
        try:
            row = showcase.require_item(event.row)
        except ValueError as error:
            return *shown(history, sources), cards.sentence(str(error))
        if event.action == "kin":
            return *shown(history, sources), cards.kin(row, KIN)
        if event.action == "remove":
            return *shown([one for one in history if one != row], sources), gr.skip()
        return *shown([*history, row], sources), gr.skip()

    def typed(item_ids: str, history: list[int], sources: list[str]) -> tuple:
        try:
            return *shown([*history, *showcase.rows_of(item_ids)], sources), ""
        except ValueError as error:
            return *shown(history, sources, cards.sentence(str(error))), gr.skip()

    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.HTML(cards.heading(name, is_synthetic))
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                words = gr.Textbox(label="Search items", placeholder="words of a title, or an id", elem_id="words")
                choice = gr.HTML(found(""), js_on_load=CLICKS, elem_id="found")
            with gr.Column(scale=3, min_width=420):
                gr.HTML("<h3>History</h3>")
                chosen = gr.HTML(cards.items([], "", "", empty), js_on_load=CLICKS, elem_id="history")
                with gr.Row():
                    ids = gr.Textbox(label="Add by id", placeholder="ids with spaces between", elem_id="ids", scale=4)
                    clear = gr.Button("Empty the history", elem_id="clear", scale=1, min_width=200, size="sm")
                said = gr.HTML("", elem_id="said")
                gr.HTML("<h3>Recommendations</h3>")
                sources = gr.CheckboxGroup(
                    [(source_label(name), name) for name in showcase.sources],
                    value=showcase.sources,
                    label="Sources that count in the score",
                    elem_id="sources",
                )
                ranking = gr.HTML("", js_on_load=CLICKS, elem_id="ranking")
        neighbours = gr.HTML("", js_on_load=CLICKS, elem_id="kin")

        # Nothing but the page calls these.
        quiet: dict = {"api_visibility": "private", "show_progress": "hidden"}
        state = [history, chosen, ranking, said]
        words.input(found, words, choice, trigger_mode="always_last", **quiet)
        words.submit(found, words, choice, **quiet)
        for listed in (choice, chosen, ranking, neighbours):
            listed.select(clicked, [history, sources], [*state, neighbours], **quiet)
        ids.submit(typed, [ids, history, sources], [*state, ids], **quiet)
        clear.click(lambda sources: (*shown([], sources), ""), sources, [*state, neighbours], **quiet)
        sources.change(lambda rows, names: ranked(rows, names) if rows else "", [history, sources], ranking, **quiet)
    return page


def launch(page: gr.Blocks, **settings) -> None:
    """Serves the page with its style, without Gradio's fonts from a network; `settings` are those of
    `gradio.Blocks.launch`."""
    fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(css=STYLE, theme=fonts, footer_links=[], ssr_mode=False, **settings)
