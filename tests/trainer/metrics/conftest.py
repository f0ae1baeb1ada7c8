from pathlib import Path

import evaluate

import mmesid.trainer


def load(name: str) -> evaluate.Metric:
    """A metric as others load it, from its folder."""
    return evaluate.load(str(Path(mmesid.trainer.__file__).parent / "metrics" / name))
