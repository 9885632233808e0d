"""``posttrain rewards score``: a rubric and its judge over responses in a file, as a table and as JSON Lines."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.errors import JudgeError, RecipeError
from posttrain.protocols import Judge
from posttrain.types import Rollout, Score, ScoreStatus
from rewards.judge import Dialect, JsonDialect, LineDialect
from rewards.rows import read_rollouts
from rewards.rubric import Rubric, RubricReward, RubricSource, TaskRubric

_DIALECTS: Mapping[str, Callable[[], Dialect]] = {"json": JsonDialect, "line": LineDialect}


async def score_rows(reward: RubricReward, rollouts: Sequence[Rollout], *, concurrency: int = 8) -> list[Score]:
    """One score a rollout, in order. A judge that fails leaves its rollout unscored, with the reason."""
    places = asyncio.Semaphore(concurrency)

    async def one(rollout: Rollout) -> Score:
        async with places:
            try:
                return await reward.score(rollout)
            except JudgeError as failure:
                return Score(value=None, status=ScoreStatus.JUDGE_ERROR, error=str(failure))

    return list(await asyncio.gather(*map(one, rollouts)))


def summary(scores: Sequence[Score]) -> Iterator[tuple[str, float | None, int]]:
    """What was scored, its mean and over how many: the value first, then each part. None where nothing was."""
    values = [score.value for score in scores if score.value is not None]
    yield "value", _mean(values), len(values)
    names = dict.fromkeys(name for score in scores for name in score.parts)
    for name in names:
        parts = [part for score in scores if (part := score.parts.get(name)) is not None]
        yield name, _mean(parts), len(parts)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@contextlib.contextmanager
def open_judge(spec: str, *, model: str = "", key_env: str | None = None) -> Iterator[Judge | None]:
    """The judge that ``--judge`` names, for the time of the context.

    ``none`` gives None, which suits rubrics of code criteria only; ``http...`` an OpenAI-compatible endpoint that
    serves ``model``; ``checkpoint:PATH`` a model of Hugging Face's kind on this machine (a folder, a hub name or
    ``package:...``); ``module:attribute`` a judge of one's own, or a function without arguments that gives one.
    """
    if spec == "none":
        yield None
    elif spec.startswith(("http://", "https://")):
        if not model:
            raise RecipeError(f"--judge {spec} needs --model, the name under which the endpoint serves its model")
        from rewards.endpoint import EndpointJudge

        yield EndpointJudge(base_url=spec, model=model, api_key_env=key_env)
    elif spec.startswith("checkpoint:"):
        from rewards.hf_judge import HFJudge

        yield HFJudge(path=spec.partition(":")[2])
    else:
        yield _own_judge(spec)


def _own_judge(spec: str) -> Judge:
    module, _, attribute = spec.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        expected = "none, http(s)://..., checkpoint:PATH or module:attribute"
        raise RecipeError(f"--judge {spec}: {error}; expected {expected}") from error
    finally:
        sys.path.remove("")
    try:
        judge = found if isinstance(found, Judge) and not isinstance(found, type) else found()
    except TypeError as error:
        raise RecipeError(f"--judge {spec}: {error}; expected a judge, or what gives one without arguments") from error
    if not isinstance(judge, Judge):
        raise RecipeError(f"--judge {spec} is a {type(judge).__name__}; expected something with an async method ask")
    return judge


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Hang ``score`` on the command line."""
    text = "Score responses in a file by a rubric."
    parser = commands.add_parser("score", help=text, description=text, epilog="Exit code: 1 when nothing was scored.")
    parser.add_argument("rubric", help="TOML file, packaged name, or info:FIELD for a rubric in each row's field")
    parser.add_argument("responses", type=Path, help="JSON Lines with 'prompt', 'response' and the rubric's fields")
    parser.add_argument(
        "--judge",
        default="none",
        help="none, an endpoint's http(s)://.../v1, checkpoint:PATH, or module:attribute (default: none)",
    )
    parser.add_argument("--model", default="", help="what the endpoint is to serve")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the endpoint's key")
    parser.add_argument("--mode", default="explicit", choices=("explicit", "batched", "implicit"))
    parser.add_argument("--dialect", default="json", choices=tuple(_DIALECTS))
    parser.add_argument("--votes", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=512, help="budget of a reply about one criterion")
    parser.add_argument("--concurrency", type=int, default=8, help="responses scored at a time")
    parser.add_argument("--out", type=Path, help="write every score here, as JSON Lines")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.concurrency < 1:
        raise RecipeError(f"--concurrency {arguments.concurrency}: expected at least 1")
    rollouts = read_rollouts(arguments.responses)
    with open_judge(arguments.judge, model=arguments.model, key_env=arguments.api_key_env) as judge:
        reward = RubricReward(
            _source(arguments.rubric),
            judge,
            dialect=_DIALECTS[arguments.dialect](),
            votes=arguments.votes,
            max_tokens=arguments.max_tokens,
            mode=arguments.mode,
        )
        scores = asyncio.run(score_rows(reward, rollouts, concurrency=arguments.concurrency))
    if arguments.out is not None:
        lines = [json.dumps(_record(rollout, score)) for rollout, score in zip(rollouts, scores, strict=True)]
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _print_table(rollouts, scores)
    return int(all(score.value is None for score in scores))


def _source(rubric: str) -> RubricSource:
    kind, _, name = rubric.partition(":")
    return TaskRubric(name) if kind == "info" and name else Rubric.load(rubric)


def _record(rollout: Rollout, score: Score) -> Mapping[str, Any]:
    return {"id": rollout.id, **asdict(score)}


def _print_table(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
    width = max(5, *(len(rollout.id) for rollout in rollouts))
    for rollout, score in list(zip(rollouts, scores, strict=True))[:20]:
        value = "none" if score.value is None else f"{score.value:.3f}"
        print(f"{rollout.id:<{width}}  {value:>6}  {score.status.value:<12}  {score.explanation or score.error}"[:160])
    if len(rollouts) > 20:
        print(f"... and {len(rollouts) - 20} more")
    print()
    names = list(summary(scores))
    width = max(len(name) for name, _, _ in names)
    for name, mean, count in names:
        print(f"{name:<{width}}  {'none' if mean is None else f'{mean:.3f}':>6}  over {count} of {len(scores)}")
    print("status: " + ", ".join(f"{status} {count}" for status, count in _statuses(scores).items()))


def _statuses(scores: Sequence[Score]) -> Mapping[str, int]:
    return Counter(score.status.value for score in scores)
