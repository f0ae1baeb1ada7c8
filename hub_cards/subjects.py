"""What has a card: one row per stage whose result is published."""

from typing import NamedTuple


class Subject(NamedTuple):
    """
    Args:
        kind (`str`): Name of the template, and of the result in a link to it.
        title (`str`): Title of the card.
        tag (`str`): Tag that finds the result on the Hub.
        description (`str`): What a link to the result says about it.
    """

    kind: str
    title: str
    tag: str
    description: str

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"


SUBJECTS = {
    "prepare": Subject("dataset", "Sequential recommendation dataset", "dataset", "the prepared dataset"),
    "sasrec": Subject("sasrec", "SASRec", "sasrec", "SASRec, the collaborative modality and a baseline"),
    "encoder": Subject("encoder", "Dual encoder of texts and pictures", "clip", "the encoder of texts and pictures"),
    "quantize": Subject(
        "quantizer", "MM-RQ-VAE semantic IDs", "semantic-ids", "the quantizer that made the semantic IDs"
    ),
    "finetune": Subject("recommender", "MME-SID recommender", "recommender", "the recommender"),
}
KINDS = {subject.kind: subject for subject in SUBJECTS.values()}


def subject_of(stage: str) -> Subject:
    """
    Raises:
        ValueError: If the stage has no card.
    """
    if stage not in SUBJECTS:
        raise ValueError(f"There is no card for the stage '{stage}'; the stages with one are {', '.join(SUBJECTS)}.")
    return SUBJECTS[stage]


def require_links(links: dict[str, str]) -> dict[str, str]:
    """
    The links, if they are names of repositories by kind.

    Raises:
        ValueError: If a kind is unknown, or a name does not have the form owner/name.
    """
    for kind, name in links.items():
        if kind not in KINDS or name.count("/") != 1:
            raise ValueError(
                f"The link {kind}={name} does not have the form kind=owner/name with a kind of {', '.join(KINDS)}."
            )
    return links
