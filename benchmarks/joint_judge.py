"""A policy that is trained as its own judge, beside a control that is trained to generate only.

    python -m benchmarks.joint_judge [--quick] [--json FILE] [--seeds 0,1] [--runs FOLDER]

Both runs of a seed have the same model, tasks, random numbers and number of generated texts (``recipes.joint_judge``).
The judge is measured on a frozen set that neither was trained on, at the start of GRPO and at its end; texts on
held-out tasks are scored with the truth about the topic in the judge's place. Intervals are 95 % bootstraps over rows
or tasks.

    python -m benchmarks.joint_judge --write-frozen

writes that set anew from what the base model says on held-out tasks.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Metric, arguments, report
from posttrain.config import Workers
from posttrain.conversation.chat import ChatFormat
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.models import load_model, load_tokenizer, resolve_path
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.runs.stats import Bootstrap, bootstrap_gain
from posttrain.types import Group, JudgeTask, Rollout, Sampling, Score, Task
from recipes import joint_judge, quickstart
from recipes.tasks.words import TOPICS
from recipes.tasks.writing import WritingTasks, line
from rewards.checks import CHECKS, words
from rewards.criteria import aggregate
from rewards.drift import FrozenSet
from rewards.joint import GoldenRow, VerdictReward
from rewards.rubric import fill

FROZEN = Path(__file__).parent.parent / "recipes" / "joint_judge.jsonl"
NUM_FROZEN = 120
"""Texts of the policy; as many correct lines join them."""
MARGIN = 0.02
"""By how much the held-out reward may lie below the control's, at the lower end of its interval."""
MAX_BIAS = 0.1
"""Largest distance of the judge's mean score from the true share of met, at the end."""
SAMPLES = 4
BRIEF_PROOF: Mapping[str, object] = {"evaluation.num_tasks": 4, "evaluation.num_samples": 1}
"""The run's own comparison is not needed: both runs are measured here."""


@dataclass(frozen=True, slots=True)
class TrueReward:
    """The recipe's rubric with the truth about the topic in place of the judge."""

    async def score(self, rollout: Rollout, sandbox: object = None) -> Score:
        info, rubric = rollout.task.info, joint_judge.rubric()
        if not words(rollout.text):
            return Score(value=0.0)
        scores: dict[str, float | None] = {"on_topic": float(joint_judge.on_topic(rollout.text, info["topic"]))}
        for each in rubric.criteria:
            if each.check is not None:
                given = {name: fill(value, info, each.id) for name, value in each.args.items()}
                scores[each.id] = float(CHECKS[each.check](rollout.text, **given))
        return Score(value=aggregate(rubric.criteria, scores).value)


def play(model: str, jobs: Sequence[GroupJob]) -> list[Group]:
    """Groups of a checkpoint, in the order of the jobs."""
    chat = ChatFormat(load_tokenizer(model))
    engine = TransformersEngine(
        load_model(model, torch.float32),
        stop_ids=chat.stop_ids,
        decode=lambda ids: str(chat.tokenizer.decode(list(ids))),
        max_batch_size=64,
        max_batch_tokens=1 << 17,
        max_length=256,
        journal=None,
    )
    player = Player(engine=engine, judge_engine=None, chat=chat, substrate=None, workers=Workers())
    try:
        return asyncio.run(player.play(jobs))
    finally:
        engine.close()


def generation(model: str, num_tasks: int) -> np.ndarray:
    """True rewards on held-out tasks, [num_tasks, SAMPLES]."""
    played = Play(
        environment=SingleTurn(), reward=TrueReward(), sampling=Sampling(max_tokens=32), max_sequence_tokens=256
    )
    jobs = [
        GroupJob(id=f"held-out/{i}", task=task, num_rollouts=SAMPLES, play=played, seed=0)
        for i, task in enumerate(WritingTasks().heldout(count=num_tasks))
    ]
    return np.array([[score.value for score in group.scores] for group in play(model, jobs)], np.float64)


def judging(model: str, rows: tuple[GoldenRow, ...], start: Mapping[str, float] | None) -> dict[str, Any]:
    """The judge's measures on the frozen rows, and its scores; ``start``: those it had before training."""
    frozen = FrozenSet(rows=rows, samples=SAMPLES, votes=(1, SAMPLES))
    sampling = Sampling(max_tokens=32, temperature=frozen.temperature)
    played = Play(environment=SingleTurn(), reward=VerdictReward(), sampling=sampling, max_sequence_tokens=256)
    groups = play(model, [_judge_job(f"frozen/{i}", task, played) for i, task in enumerate(frozen.tasks())])
    scores = frozen.scores(groups)
    right = [[float(score.value or 0.0) for score in group.scores] for group in groups]
    return {"metrics": frozen.measure(groups, start or scores), "scores": scores, "right": right}


def _judge_job(job_id: str, task: JudgeTask, played: Play) -> GroupJob:
    return GroupJob(id=job_id, task=task.variants[0], num_rollouts=SAMPLES, play=played, seed=0)


def train(run: Path, seed: int, *, joint: bool, settings: Mapping[str, object]) -> Path:
    """Run the recipe, or go on with it; the final checkpoint of its GRPO stage."""
    judging = {} if joint else {"domains.writing.judge_training": "none"}
    chosen = {"seed": seed, "workers.threads_per_actor": 1, **BRIEF_PROOF, **settings, **judging}
    command = [sys.executable, "-m", "posttrain.cli", "run", "joint_judge", "--run-dir", str(run), "--resume"]
    command += [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    # One thread suits so small a model, and repeats bit for bit.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    return run / "stages" / "grpo-writing" / "final"


def compare(
    folder: Path, seed: int, *, num_tasks: int, num_rows: int, settings: Mapping[str, object]
) -> dict[str, Any]:
    """Both runs of a seed, side by side, and what they came to."""
    rows = joint_judge.frozen()[:num_rows]
    names = ("joint", "control")
    with ThreadPoolExecutor(len(names)) as pool:
        runs = [pool.submit(train, folder / f"{n}-{seed}", seed, joint=n == "joint", settings=settings) for n in names]
        paths = {name: run.result() for name, run in zip(names, runs, strict=True)}
    paths["start"] = folder / f"joint-{seed}" / "stages" / "sft-writing" / "final"
    start = judging(str(paths["start"]), rows, None)
    judges = {name: judging(str(path), rows, start["scores"]) for name, path in paths.items()}
    texts = {name: generation(str(path), num_tasks) for name, path in paths.items()}
    options = Bootstrap()
    gains = {
        "judge_gain": bootstrap_gain(np.array(judges["joint"]["right"]), np.array(judges["start"]["right"]), options),
        "reward_gain": bootstrap_gain(texts["joint"], texts["start"], options),
        "reward_over_control": bootstrap_gain(texts["joint"], texts["control"], options),
    }
    return {
        "seed": seed,
        "judge": {name: found["metrics"] for name, found in judges.items()},
        "unchecked_topics": {name: _unchecked(rows, found["right"]) for name, found in judges.items()},
        "reward": {name: float(values.mean()) for name, values in texts.items()},
        **{name: [found.value, found.low, found.high] for name, found in gains.items()},
    }


def _unchecked(rows: Sequence[GoldenRow], right: Sequence[Sequence[float]]) -> float:
    """Accuracy on topics about which the run's own texts gave no answers."""
    names = [joint_judge.ON_TOPIC.format(topic=topic) for topic in TOPICS if topic not in joint_judge.CHECKED_TOPICS]
    return float(np.mean([each for row, each in zip(rows, right, strict=True) if row.criterion in names]))


def metrics_of(found: Mapping[str, Any], *, quick: bool) -> list[Metric]:
    """The table's lines for one seed. In the quick form the judge has to rise, not yet beyond the start's interval."""
    seed, judge, reward = found["seed"], found["judge"], found["reward"]
    lines = [
        Metric(f"{name}_judge_{measure}/{seed}", judge[name][measure], "", "")
        for measure in ("accuracy", "kappa", "unreadable")
        for name in ("start", "joint", "control")
    ]
    lines += [Metric(f"{name}_reward/{seed}", reward[name], "", "") for name in ("start", "joint", "control")]
    rises = judge["joint"]["accuracy_low"] - judge["start"]["accuracy_high"]
    return [
        *lines,
        Metric(f"judge_gain_low/{seed}", found["judge_gain"][1], "accuracy", ">= 0"),
        Metric(f"judge_interval_above_start/{seed}", rises, "accuracy", "" if quick else ">= 0"),
        Metric(f"reward_over_control/{seed}", found["reward_over_control"][0], "", ""),
        Metric(f"reward_over_control_low/{seed}", found["reward_over_control"][1], "", f">= {-MARGIN}"),
        Metric(f"joint_bias/{seed}", abs(judge["joint"]["bias"]), "mean score", f"<= {MAX_BIAS}"),
        Metric(f"joint_shift/{seed}", judge["joint"]["shift"], "mean score", ""),
        Metric(f"joint_self_preference/{seed}", judge["joint"]["self_preference"], "mean score", ""),
        Metric(f"joint_length_bias/{seed}", judge["joint"]["length_bias"], "r", ""),
    ]


def write_frozen() -> None:
    """Texts of the base model on held-out tasks and correct lines for the same tasks, labelled in code."""
    played = Play(
        environment=SingleTurn(), reward=TrueReward(), sampling=Sampling(max_tokens=32), max_sequence_tokens=256
    )
    tasks = WritingTasks().heldout(count=4 * NUM_FROZEN)
    jobs = [GroupJob(id=f"frozen/{i}", task=t, num_rollouts=1, play=played, seed=1) for i, t in enumerate(tasks)]
    groups = play(resolve_path(quickstart.BASE.path), jobs)
    rng = random.Random(0)
    records = []
    for group in groups:
        text, info = group.rollouts[0].text, group.task.info
        about = [topic for topic in TOPICS if joint_judge.on_topic(text, topic)]
        if not about:
            continue
        reference = line(rng, rng.choice(info["topic_words"]), rng.choice(_words_of_another(rng, info["topic"])))
        records += [_record(group.task, text, "policy", rng), _record(group.task, reference, "other", rng)]
    chosen = records[: 2 * NUM_FROZEN]
    FROZEN.write_text("".join(json.dumps(record) + "\n" for record in chosen), encoding="utf-8")
    print(f"wrote {len(chosen)} texts to {FROZEN}")


def _words_of_another(rng: random.Random, topic: str) -> tuple[str, ...]:
    """Words of another topic."""
    return TOPICS[rng.choice([other for other in TOPICS if other != topic])]


def _record(task: Task, text: str, author: str, rng: random.Random) -> dict[str, Any]:
    """A text and a topic that it is about, or not, as often the one as the other, whatever its task asked for."""
    about = [topic for topic in TOPICS if joint_judge.on_topic(text, topic)]
    topic = rng.choice(about if rng.random() < 0.5 else [name for name in TOPICS if name not in about])
    return {
        "prompt": task.prompt[0]["content"],
        "response": text,
        "labels": {"on_topic": "met" if topic in about else "unmet"},
        "author": author,
        "info": {"topic": topic},
    }


QUICK: Mapping[str, object] = {"domains.writing.grpo.max_steps": 5}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on with those that are there")
    parser.add_argument("--write-frozen", action="store_true")
    options = parser.parse_args()
    if options.write_frozen:
        write_frozen()
        return
    torch.set_num_threads(1)
    settings = QUICK if options.quick else {}
    num_tasks, num_rows = (40, 80) if options.quick else (200, 2 * NUM_FROZEN)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or Path(scratch)
        found = [
            compare(folder, int(seed), num_tasks=num_tasks, num_rows=num_rows, settings=settings)
            for seed in options.seeds.split(",")
        ]
    metrics = [metric for each in found for metric in metrics_of(each, quick=options.quick)]
    report("joint judge", metrics, options.json, seeds=found)


if __name__ == "__main__":
    main()
