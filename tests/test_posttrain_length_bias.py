"""Interruptions must not prefer short answers: a statistical test of the engine and its journal.

4000 requests are interrupted at a fixed rate per token until they are answered. With a journal, their lengths follow
the law of an engine that nothing disturbs. Started over instead, a long answer has more chances to be interrupted, and
the lengths follow ``p(y) (1 - rate)^|y|``, up to a factor: the length bias that DeepSeek-V4 describes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.engine.file_journal import FileJournal
from posttrain.engine.journal import Journal, NoJournal, Progress
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.errors import EngineStopped
from posttrain.types import Completion, Request, Sampling

STOP_PROBABILITY = 1 / 20
RATE = 1 / 20
"""Interruptions per token; as high as the stop probability, which about halves the mean of what survives."""
COUNT = 4000
SIGNIFICANCE = 1e-3

Lengths = npt.NDArray[np.int64]


class Interrupting(NoJournal):
    """Interrupts whoever asked, after each token at a fixed rate, and writes down what another journal does."""

    def __init__(self, journal: Journal) -> None:
        self._rng, self._journal = np.random.default_rng(0), journal
        self.asking: dict[str, asyncio.Task[Completion]] = {}
        self.interrupted: set[str] = set()
        self.count = 0

    def begin(self, request: Request) -> Progress:
        return self._journal.begin(request)

    def append(self, rows: Sequence[Progress]) -> None:
        self._journal.append(rows)
        for row, number in zip(rows, self._rng.random(len(rows)), strict=True):
            if number < RATE:
                self.interrupted.add(row.request.id)
                task = self.asking[row.request.id]
                task.get_loop().call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        self._journal.close()


class Mortal(FileJournal):
    """Dies after writing down a step, at a fixed rate, and takes the engine along."""

    def append(self, rows: Sequence[Progress]) -> None:
        super().append(rows)
        if deaths.random() < RATE / 2:
            raise Death


class Death(Exception):
    pass


deaths = np.random.default_rng(0)


def uniform_model() -> LlamaForCausalLM:
    """Draws every one of its tokens alike, so that lengths are geometric."""
    config = LlamaConfig(
        vocab_size=round(1 / STOP_PROBABILITY),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def question(name: str) -> Request:
    return Request(id=name, prompt_ids=np.array([1], np.int32), sampling=Sampling(max_tokens=900))


def answer_all(engine: TransformersEngine, name: str) -> dict[int, int]:
    """Lengths of the answers to all questions, of those that this engine lives to give."""

    async def ask() -> list[Completion | BaseException]:
        asked = (engine.generate(question(f"{name}/{i}")) for i in range(COUNT))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    answers = asyncio.run(ask())
    assert all(isinstance(answer, (Completion, EngineStopped)) for answer in answers)
    return {i: len(answer.token_ids) for i, answer in enumerate(answers) if isinstance(answer, Completion)}


def answer_all_interrupted(journal: Interrupting, name_of: Callable[[int, int], str]) -> Lengths:
    """Lengths of all answers when whoever was interrupted asks again, under a name by question and attempt."""
    engine = TransformersEngine(uniform_model(), stop_ids=[0], max_batch_size=256, journal=journal)

    async def insist(i: int) -> int:
        for attempt in itertools.count():
            name = name_of(i, attempt)
            journal.interrupted.discard(name)
            task = journal.asking[name] = asyncio.create_task(engine.generate(question(name)))
            with contextlib.suppress(asyncio.CancelledError):
                completion = await task
                if name not in journal.interrupted:
                    return len(completion.token_ids)
            journal.count += 1
        raise AssertionError

    async def ask() -> list[int]:
        return list(await asyncio.gather(*map(insist, range(COUNT))))

    lengths = asyncio.run(ask())
    engine.close()
    return np.array(lengths)


def distance(a: Lengths, b: Lengths) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    grid = np.arange(max(a.max(), b.max()) + 1)
    below_a, below_b = (np.searchsorted(np.sort(lengths), grid, "right") for lengths in (a, b))
    return float(np.abs(below_a - below_b).max() / COUNT)


def distance_to_law(a: Lengths, stop: float) -> float:
    """The same between a sample and the geometric law that ends with probability ``stop`` at each token."""
    grid = np.arange(1, a.max() + 1)
    return float(np.abs(np.searchsorted(np.sort(a), grid, "right") / COUNT - (1 - (1 - stop) ** grid)).max())


CRITICAL_ONE = math.sqrt(-math.log(SIGNIFICANCE / 2) / (2 * COUNT))
CRITICAL_TWO = math.sqrt(-math.log(SIGNIFICANCE / 2) / COUNT)


@pytest.fixture(scope="module")
def undisturbed() -> Lengths:
    engine = TransformersEngine(uniform_model(), stop_ids=[0], max_batch_size=256)
    lengths = answer_all(engine, "undisturbed")
    engine.close()
    return np.array([lengths[i] for i in range(COUNT)])


def test_the_undisturbed_law_is_geometric(undisturbed):
    assert distance_to_law(undisturbed, STOP_PROBABILITY) < CRITICAL_ONE
    assert undisturbed.mean() == pytest.approx(1 / STOP_PROBABILITY, rel=0.05)


def test_engines_that_die_and_go_on_leave_the_law_as_it_is(undisturbed, tmp_path: Path):
    lengths: dict[int, int] = {}
    lives = 0
    while len(lengths) < COUNT:
        engine = TransformersEngine(
            uniform_model(), stop_ids=[0], max_batch_size=256, journal=Mortal(tmp_path, writer="e")
        )
        lengths = answer_all(engine, "resumed")
        engine.close()
        lives += 1
    assert lives > 4
    resumed = np.array([lengths[i] for i in range(COUNT)])
    assert distance(resumed, undisturbed) < CRITICAL_TWO
    assert distance_to_law(resumed, STOP_PROBABILITY) < CRITICAL_ONE


def test_interrupted_answers_that_go_on_keep_the_law(undisturbed, tmp_path: Path):
    journal = Interrupting(FileJournal(tmp_path, writer="e"))
    lengths = answer_all_interrupted(journal, lambda i, attempt: f"resumed/{i}")
    assert journal.count > COUNT / 2
    assert distance(lengths, undisturbed) < CRITICAL_TWO
    assert distance_to_law(lengths, STOP_PROBABILITY) < CRITICAL_ONE


def test_interrupted_answers_that_start_over_are_short_by_the_factor_of_their_survival(undisturbed):
    journal = Interrupting(NoJournal())
    lengths = answer_all_interrupted(journal, lambda i, attempt: f"again/{i}/{attempt}")
    assert journal.count > COUNT / 2
    assert distance(lengths, undisturbed) > 3 * CRITICAL_TWO
    # p(y) (1 - rate)^|y| of a geometric law is geometric again.
    biased = 1 - (1 - STOP_PROBABILITY) * (1 - RATE)
    assert distance_to_law(lengths, biased) < CRITICAL_ONE
    assert lengths.mean() == pytest.approx(1 / biased, rel=0.05)
