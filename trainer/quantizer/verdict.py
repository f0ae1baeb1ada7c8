"""What the metrics of a quantizer say, as a table and in words, for who has just trained it."""

from collections.abc import Sequence


# From where on a figure is worth a word.
FEW_CODES_USED = 0.5
MANY_SHARED_IDS = 0.2
WEAK_TAU = 0.3


def summary(metrics: dict[str, dict], modalities: Sequence[str]) -> str:
    """
    One line per figure and one column per modality, and below what to do about what stands out.

    Args:
        metrics (`dict[str, dict]`): `held_out` and `items`, as the stage records them.
        modalities (`Sequence[str]`): In their order.
    """
    held_out, items = metrics["held_out"], metrics["items"]
    uses = {modality: _levels(items, "use", modality) for modality in modalities}
    perplexities = {modality: _levels(items, "perplexity", modality) for modality in modalities}
    rows = [
        ["", *modalities],
        ["distances kept, Kendall's tau of held-out items", *(f"{held_out[f'tau_{one}']:.3f}" for one in modalities)],
        ["codes in use, by level", *(" ".join(f"{use:.0%}" for use in uses[one]) for one in modalities)],
        ["perplexity, by level", *(" ".join(f"{one:.0f}" for one in perplexities[name]) for name in modalities)],
        ["items that share their ID", *(f"{items[f'collisions_{one}']:.1%}" for one in modalities)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return f"{table}\n{_verdict(held_out, items, uses)}"


def _levels(items: dict, name: str, modality: str) -> list[float]:
    keys = (f"{name}@{level}_{modality}" for level in range(1, len(items) + 1))
    return [items[key] for key in keys if key in items]


def _verdict(held_out: dict, items: dict, uses: dict[str, list[float]]) -> str:
    found = []
    for modality, by_level in uses.items():
        if min(by_level) < FEW_CODES_USED:
            level = by_level.index(min(by_level)) + 1
            found.append(
                f"Level {level} of {modality} uses {min(by_level):.0%} of its codes: a smaller codebook_size would do."
            )
        if items[f"collisions_{modality}"] > MANY_SHARED_IDS:
            found.append(
                f"{items[f'collisions_{modality}']:.0%} of the items share their ID in {modality}: more codebook_size "
                "or num_quantizers tells them apart, and resolve_collisions true all of them."
            )
        if held_out[f"tau_{modality}"] < WEAK_TAU:
            found.append(
                f"The codes keep little of the distances in {modality}: more codebook_size, num_quantizers or "
                "num_train_epochs keep more."
            )
    return "\n".join(found or ["All codes are put to use, IDs tell items apart, and distances are kept."])
