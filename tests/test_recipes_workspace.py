"""Chores in a tree of files: what the scripted solver does earns 1 in a real box, what only looks like it earns 0."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from posttrain.config import Workers
from posttrain.conversation.dsml import calls_of, write_calls
from posttrain.conversation.tool_calls import format_tool_call, parse_tool_call
from posttrain.conversation.v4 import V4Format
from posttrain.conversation.v4_tokens import EOS
from posttrain.conversation.vocabulary import prepare_tokenizer
from posttrain.errors import RecipeError
from posttrain.rollout.environments import ToolCalling
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.types import (
    Completion,
    FinishReason,
    Group,
    Message,
    Request,
    Rollout,
    Sampling,
    Score,
    StopReason,
    ToolCall,
)
from recipes.tasks.splits import SolvedTask, training
from recipes.tasks.workspace import LEVELS, WorkspaceTasks
from recipes.workspace_grpo import workspace
from rewards.agent import FinalStateReward
from sandbox.process import Process
from sandbox.tools import BoxTools
from tests.boxes import require
from tests.tiny_models import tiny_tokenizer

Calls = Sequence[ToolCall]


@pytest.fixture(scope="module")
def isolated() -> Process:
    return require(Process())


@pytest.fixture(scope="module")
def chat() -> V4Format:
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer)
    return V4Format(tokenizer)


def solved_tasks(source: WorkspaceTasks, count: int, *, seed: int = 0) -> list[SolvedTask]:
    return list(islice(training(source.draw, seed=seed), count))


def turns_of(solved: SolvedTask) -> list[Message]:
    return [message for message in solved.solution if message["role"] == "assistant"]


class Solver:
    """An engine that says the turns of the scripted solver, by the name of the job."""

    def __init__(self, chat: V4Format, tasks: Mapping[str, SolvedTask]) -> None:
        self._chat = chat
        self._said = {name: turns_of(solved) for name, solved in tasks.items()}

    async def generate(self, request: Request) -> Completion:
        job, _, turn = request.id.split("/")
        text = f"\n\n{write_calls(calls_of(self._said[job][int(turn)]))}{EOS}"
        ids = np.array(self._chat.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        return Completion(
            request_id=request.id,
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            versions=np.zeros(len(ids), np.int32),
            finish=FinishReason.STOP,
        )

    def forget(self, prefix: str) -> None:
        """Nothing is kept."""


def play(
    substrate: Process, chat: V4Format, tasks: Mapping[int, SolvedTask], *, turns_missing: int | None = None
) -> dict[int, Group]:
    """One rollout in the recipe's domain of each difficulty; with turns missing the limit is that much too low."""
    jobs = []
    for difficulty, solved in tasks.items():
        domain = workspace(difficulty)
        environment = domain.environment
        assert isinstance(environment, ToolCalling)
        if turns_missing is not None:
            environment = replace(environment, max_turns=len(turns_of(solved)) - turns_missing)
        # A token a byte, so that the window is wider than the recipe's.
        sampling, window = Sampling(max_tokens=10_000), 60_000
        jobs.append(
            GroupJob(
                id=str(difficulty),
                task=solved.task,
                num_rollouts=1,
                seed=0,
                play=Play(environment=environment, reward=domain.reward, sampling=sampling, max_sequence_tokens=window),
            )
        )
    engine = Solver(chat, {str(difficulty): solved for difficulty, solved in tasks.items()})
    player = Player(engine=engine, judge_engine=None, chat=chat, substrate=substrate, workers=Workers(max_retries=0))
    return dict(zip(tasks, asyncio.run(player.play(jobs)), strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_solver_earns_the_reward_and_is_answered_as_in_its_demonstration(isolated, chat, seed):
    tasks = {level: solved_tasks(WorkspaceTasks(difficulty=level), 1, seed=seed)[0] for level in LEVELS}
    for level, group in play(isolated, chat, tasks).items():
        (rollout,), (score,) = group.rollouts, group.scores
        assert (score.value, rollout.stop) == (1.0, StopReason.FINISHED), (level, score.explanation, rollout.error)
        heard = [re.sub(r"\n\(\d turns? left\)$", "", m["content"]) for m in rollout.messages if m["role"] == "tool"]
        assert heard == [m["content"] for m in tasks[level].solution if m["role"] == "tool"]


def test_an_episode_cut_by_its_turns_is_graded_as_it_stands(isolated, chat):
    tasks = {level: solved_tasks(WorkspaceTasks(difficulty=level), 1)[0] for level in (2, 3)}
    for missing, value in ((1, 1.0), (2, 0.0)):
        # The last turn hands in, which the end state does not ask for; the one before is work.
        for group in play(isolated, chat, tasks, turns_missing=missing).values():
            assert (group.rollouts[0].stop, group.scores[0].value) == (StopReason.TURNS, value)
            warned = [m["content"].rpartition("\n")[2] for m in group.rollouts[0].messages if m["role"] == "tool"]
            assert "(1 turn left)" in warned


def grade(substrate: Process, solved: SolvedTask, turns: Sequence[str]) -> Score:
    """What these turns earn, said one after the other."""

    async def work() -> Score:
        environment = ToolCalling(tools=BoxTools(), form="fence", keep="tree")
        async with substrate.open(solved.task.sandbox) as box:
            episode = environment.start(solved.task, box)
            for text in turns:
                await episode.respond(text)
            artifacts = await episode.artifacts()
        rollout = Rollout(id="r", task=solved.task, turns=(), stop=StopReason.FINISHED, artifacts=artifacts)
        return await FinalStateReward(exact=True).score(rollout)

    return asyncio.run(work())


def test_the_solver_also_speaks_json(isolated):
    (solved,) = solved_tasks(WorkspaceTasks(difficulty=5, form="fence"), 1)
    score = grade(isolated, solved, [turn["content"] for turn in turns_of(solved)])
    assert score.value == 1.0, score.explanation


def bash(command: str) -> ToolCall:
    return ToolCall("bash", {"command": command})


def cheats(calls: Calls, expected: Mapping[str, str], found: Mapping[str, bytes]) -> dict[str, list[ToolCall]]:
    """Near misses, from the calls of a solution without its submission."""
    done = list(calls)
    written = [path for path in expected if path.startswith("out/")]
    copies = [bash(call.arguments["command"].replace("mv ", "cp ")) if call.name == "bash" else call for call in done]
    claims = [
        ToolCall("write", {"path": path, "content": "{}"}) for path in ("expected_files.json", "score.txt", "reward")
    ]
    return {
        "nothing": [],
        "only handing in": [ToolCall("submit", {"paths": list(found)})],
        "only claims": claims,
        "claims on top": [*done, claims[1]],
        "the last step left out": done[:-1],
        "copied, not moved": copies,
        "all deleted": [bash("rm -rf -- *")],
        "a note left": [*done, bash("echo hm > .note")],
        "a link for a file": [*done, bash(f"mv {written[0]} /tmp/x && ln -s /tmp/x {written[0]}")],
        "a directory for a file": [*done, bash(f"rm {written[0]} && mkdir {written[0]}")],
        "a huge file": [*done, bash(f"yes | head -c 200000 >> {written[0]}")],
        "a blank more": [*done, bash(f"printf ' ' >> {written[0]}")],
        "one number off": [*done, bash(f"sed -i 's/[0-9]/&1/' {written[0]}")],
        "an input changed": [*done, bash("echo >> bin/fetch.sh; echo x >> bin/fetch.sh")],
        "all of it in another folder": [*done, bash("mkdir w && mv out w/")],
        "many files": [*done, bash("for i in $(seq 500); do echo > $i; done")],
    }


def one_with_moves() -> SolvedTask:
    for solved in solved_tasks(WorkspaceTasks(difficulty=5, form="fence"), 50):
        if any("inbox" in path for path in solved.task.sandbox.files):
            return solved
    raise AssertionError("no task moves files")


def test_cheats_and_near_misses_earn_nothing(isolated):
    solved = one_with_moves()
    calls = [parse_tool_call(turn["content"]) for turn in turns_of(solved)][:-1]
    expected = solved.task.info["expected_files"]
    tried = cheats(calls, expected, solved.task.sandbox.files)
    scores = {name: grade(isolated, solved, list(map(format_tool_call, made))) for name, made in tried.items()}
    assert {name for name, score in scores.items() if score.value != 0.0} == set()
    # The cheats fail for what they do, not for what they were built on.
    assert grade(isolated, solved, list(map(format_tool_call, calls))).value == 1.0
    assert scores["a note left"].explanation == "There is a file '.note', which is not expected."
    assert "line 2 is ' ', expected ''" in scores["a blank more"].explanation
    assert "is missing" in scores["a directory for a file"].explanation


@pytest.mark.parametrize("difficulty", LEVELS)
def test_nothing_is_done_before_the_work_and_each_level_asks_for_more(difficulty):
    tasks = solved_tasks(WorkspaceTasks(difficulty=difficulty), 100)
    for solved in tasks:
        before = {path: data.decode() for path, data in solved.task.sandbox.files.items()}
        assert before != solved.task.info["expected_files"]
        # What has to be written is not to be read off the request.
        for path, text in solved.task.info["expected_files"].items():
            if path in ("out/total.txt", "out/token.txt"):
                assert text.strip() not in solved.task.prompt[-1]["content"].split()
    if difficulty > 1:
        easier = solved_tasks(WorkspaceTasks(difficulty=difficulty - 1), 100)
        assert _mean_calls(tasks) > _mean_calls(easier) + 0.5


def _mean_calls(tasks: Sequence[SolvedTask]) -> float:
    return sum(len(turn["tool_calls"]) for solved in tasks for turn in turns_of(solved)) / len(tasks)


def test_hard_levels_fail_at_first_and_quote():
    solved = solved_tasks(WorkspaceTasks(difficulty=5), 20)
    for each in solved:
        assert sum(message["content"].startswith("busy") for message in each.solution) == LEVELS[5].failures
        assert max(len(turn["tool_calls"]) for turn in turns_of(each)) == LEVELS[5].chores
    paths = "".join(path for each in solved for path in each.task.sandbox.files)
    assert set("'$& ()") <= set(paths)
    written = "".join(each.task.info["expected_files"].get("notes/phrase.txt", "") for each in solved)
    assert set("'\"\\$`<|#") <= set(written)


def test_a_level_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="difficulty = 6"):
        WorkspaceTasks(difficulty=6)
    with pytest.raises(RecipeError, match="partial and exact"):
        FinalStateReward(partial=True, exact=True)
