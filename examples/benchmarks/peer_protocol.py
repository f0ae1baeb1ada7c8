"""
What the programs that `peers.py` compares are given, and what each of them reports. Every program runs alone in a
process, in an environment of its own, so that this file imports nothing but NumPy and torch.
"""

import json
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


TOP_K = 10


@dataclass
class Setting:
    """
    What all programs have in common.

    Args:
        data_dir (`str`): Folder with sequences.txt and items.jsonl.
        hidden_size (`int`): Width of items and states.
        num_hidden_layers, num_attention_heads (`int`): Blocks, and heads of each.
        max_history (`int`): Items that are read.
        batch_size (`int`): Users in a step.
        eval_batch_size (`int`): Users ranked at a time.
        learning_rate, dropout (`float`): As they are called.
        epochs (`int`): How often training sees every user.
        steps (`int`): End training after so many steps; 0 trains whole epochs. Ours, whose steps are unlike each
            other, takes as many as are a fair sample of an epoch.
        bf16 (`bool`): Train under bfloat16 autocast.
        threads (`int`): Threads of torch.
        seed (`int`): Seed of weights and orders.
    """

    data_dir: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_history: int
    batch_size: int
    eval_batch_size: int
    learning_rate: float
    dropout: float
    epochs: int
    steps: int
    bf16: bool
    threads: int
    seed: int

    @cached_property
    def num_items(self) -> int:
        with open(Path(self.data_dir) / "items.jsonl") as file:
            return sum(1 for _ in file)

    @cached_property
    def sequences(self) -> list[np.ndarray]:
        """
        Every user's items as rows from 1, oldest first, the test target last and the validation target before it. No
        more than a model reads is kept (`max_history`, the item to predict from the last of them, and both targets),
        so that all programs train on the same targets and mask the same items.
        """
        with open(Path(self.data_dir) / "items.jsonl") as file:
            rows = {str(json.loads(line)["item"]): row for row, line in enumerate(file, start=1)}
        with open(Path(self.data_dir) / "sequences.txt") as file:
            users = [[rows[item] for item in line.split()[1:]] for line in file]
        return [np.array(items[-(self.max_history + 3) :]) for items in users]

    @property
    def targets(self) -> np.ndarray:
        """The test targets, `(users,)`."""
        return np.array([items[-1] for items in self.sequences])

    @property
    def interactions(self) -> tuple[np.ndarray, np.ndarray]:
        """Users, `(interactions,)` from 0, and items of all sequences, in order."""
        return (
            np.repeat(np.arange(len(self.sequences)), [len(items) for items in self.sequences]),
            np.concatenate(self.sequences),
        )


@dataclass
class Clock:
    """Wall-clock and CPU time of the process, at the start of what is measured and at the end of each step."""

    moments: list[tuple[float, float]] = field(default_factory=list)

    def tick(self) -> None:
        self.moments.append((time.perf_counter(), time.process_time()))

    def epoch(self, steps: int) -> dict[str, float]:
        """Seconds and CPU seconds of an epoch of so many steps, by those that were measured."""
        (first, first_cpu), (last, last_cpu) = self.moments[0], self.moments[-1]
        share = steps / (len(self.moments) - 1)
        return {"epoch_seconds": (last - first) * share, "epoch_cpu_seconds": (last_cpu - first_cpu) * share}


def timed(prefix: str, work: Callable) -> tuple[object, dict[str, float]]:
    """The result of `work`, and the seconds and CPU seconds that it took."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        f"{prefix}_seconds": time.perf_counter() - start,
        f"{prefix}_cpu_seconds": time.process_time() - cpu,
    }


def quality(recommended: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """nDCG and HR at `TOP_K` of recommended rows, `(users, TOP_K)`, best first, for `targets`, `(users,)`."""
    users, places = np.nonzero(recommended == targets[:, None])
    return {
        f"ndcg@{TOP_K}": float((1 / np.log2(places + 2)).sum() / len(targets)),
        f"hr@{TOP_K}": len(users) / len(targets),
    }


def peak_memory() -> int:
    """Bytes of memory at the peak of the process, libraries included."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", *packages)}}


def run(measure: Callable[[str, Setting], dict]) -> None:
    """Of a program's own process: the name of the program and the setting are its arguments, and the last line that it
    prints is what it measured."""
    setting = Setting(**json.loads(sys.argv[2]))
    torch.set_num_threads(setting.threads)
    result = measure(sys.argv[1], setting)
    print(json.dumps(result | {"peak_memory_bytes": peak_memory()}))
