"""Episodes: exact tokens, honest stop reasons, and failures that stay apart from the policy's."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.config import GRPO, Workers
from posttrain.errors import JudgeError, SandboxLost
from posttrain.protocols import Ask, Sandbox
from posttrain.rollout.environments import SingleTurn, SingleTurnEpisode, ToolUse
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.rollout.samples import distill_samples, group_advantage_rows, group_metrics, grpo_samples, sample_of
from posttrain.runs.rollout_log import rollout_record
from posttrain.types import (
    Completion,
    ExecResult,
    ExecStatus,
    FinishReason,
    Group,
    Message,
    Request,
    Rollout,
    Route,
    Sampling,
    SandboxSpec,
    Score,
    ScoreStatus,
    StopReason,
    Task,
    Turn,
)
from rewards.agent import FinalStateReward
from sandbox.local import LocalUnsafe
from tests.tiny_models import END, FakeBox, FakeSubstrate, Reply, ScriptedEngine, said, spell, tiny_chat

LS = "```bash\nls\n```"
CAT = "look:\n```bash\ncat a b\n```\nand\n```bash\nrm a\n```"


@dataclass(frozen=True)
class Constant:
    """Scores everything alike and remembers what it saw."""

    value: float = 1.0
    seen: list[Rollout] = field(default_factory=list)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        self.seen.append(rollout)
        return Score(value=self.value)


def task(prompt: str = "q", *, sandbox: SandboxSpec | None = None, **info: Any) -> Task:
    return Task(id="t1", domain="d", prompt=({"role": "user", "content": prompt},), sandbox=sandbox, info=info)


def job(
    asked: Task | None = None,
    *,
    reward: Any = None,
    environment: Any = None,
    sampling: Sampling | None = None,
    name: str = "s/0",
    num_rollouts: int = 1,
    max_sequence_tokens: int = 400,
) -> GroupJob:
    play = Play(
        environment=environment or SingleTurn(),
        reward=reward,
        sampling=sampling or Sampling(max_tokens=100),
        max_sequence_tokens=max_sequence_tokens,
    )
    return GroupJob(id=name, task=asked or task(), num_rollouts=num_rollouts, play=play, seed=3)


def play(
    *jobs: GroupJob,
    script: Callable[[Request], Reply] = lambda request: "ok",
    engine: Any = None,
    judge: Any = None,
    substrate: Any = None,
    **workers: Any,
) -> list[Group]:
    player = Player(
        engine=engine or ScriptedEngine(script),
        judge_engine=judge,
        chat=tiny_chat(),
        substrate=substrate,
        workers=Workers(**{"max_retries": 0, **workers}),
    )
    return asyncio.run(asyncio.wait_for(player.play(jobs), 30))


def by_turn(*replies: Reply) -> Callable[[Request], Reply]:
    return lambda request: replies[int(request.id.rpartition("/")[2])]


# Tokens


def test_a_single_turn_keeps_exactly_the_tokens_that_were_generated():
    engine = ScriptedEngine(lambda request: "ab", version=5)
    [group] = play(job(task("hi ab"), reward=Constant()), engine=engine)
    [rollout] = group.rollouts
    prompt = tiny_chat().encode_prompt(rollout.task.prompt)
    generated = [*spell("ab"), END]
    assert tiny_chat().encode("ab").tolist() != spell("ab")
    assert engine.requests[0].prompt_ids.tolist() == prompt.tolist()
    assert rollout.token_ids.tolist() == [*prompt, *generated]
    assert rollout.loss_mask.tolist() == [False] * len(prompt) + [True] * 3
    assert np.isnan(rollout.logprobs[: len(prompt)]).all()
    assert rollout.logprobs[len(prompt) :].tolist() == [-len(prompt) - i for i in range(3)]
    assert rollout.versions.tolist() == [-1] * len(prompt) + [5, 6, 7]
    assert (rollout.text, rollout.stop, rollout.error) == ("ab", StopReason.FINISHED, None)
    assert group.scores == (Score(value=1.0),)


def test_a_conversation_with_tools_is_the_sequence_the_engine_was_shown():
    engine = ScriptedEngine(by_turn(LS, CAT, "ab"))
    substrate = FakeSubstrate(answer=lambda command: said("ab\n") if command == "ls" else said("no", exit_code=1))
    asked = task("use ab", sandbox=SandboxSpec(files={"out": b"kept", "big": b"x" * 9}), expected_files=["out", "gone"])
    [group] = play(job(asked, environment=ToolUse(), reward=Constant()), engine=engine, substrate=substrate)
    [rollout] = group.rollouts
    assert substrate.boxes[0].commands == ["ls", "cat a b"]
    assert [m["content"] for m in rollout.messages if m["role"] == "tool"] == ["ab", "no\n(exit code 1)"]
    for request in engine.requests:
        assert request.prompt_ids.tolist() == rollout.token_ids[: len(request.prompt_ids)].tolist()
    starts = [len(request.prompt_ids) for request in engine.requests]
    spoken = [[*spell(text), END] for text in (LS, CAT, "ab")]
    assert len(rollout.token_ids) == starts[-1] + len(spoken[-1])
    mask = np.zeros(len(rollout.token_ids), bool)
    for start, tokens in zip(starts, spoken, strict=True):
        assert rollout.token_ids[start : start + len(tokens)].tolist() == tokens
        mask[start : start + len(tokens)] = True
    assert rollout.loss_mask.tolist() == mask.tolist()
    assert rollout.logprobs[mask].tolist() == (-np.flatnonzero(mask)).tolist()
    assert rollout.versions[mask].tolist() == [5 + i for tokens in spoken for i in range(len(tokens))]
    whole = tiny_chat().tokenizer.apply_chat_template([*asked.prompt, *rollout.messages], tokenize=False)
    assert tiny_chat().tokenizer.decode(rollout.token_ids) == whole
    assert rollout.artifacts == {"out": b"kept"}
    assert rollout.stop is StopReason.FINISHED


@dataclass
class Keeping(FakeSubstrate):
    """Remembers for which attempt each box was opened."""

    attempts: list[str] = field(default_factory=list)

    def for_run(self, folder: Path) -> contextlib.AbstractContextManager[Keeping]:
        return contextlib.nullcontext(self)

    def open_for(self, attempt: str, spec: SandboxSpec) -> contextlib.AbstractAsyncContextManager[FakeBox]:
        self.attempts.append(attempt)
        return self.open(spec)


def test_every_attempt_at_a_rollout_has_a_box_of_its_own_and_grading_a_fresh_one():
    substrate = Keeping(failures=[SandboxLost("the box is gone")])
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), reward=GradesInABox())
    again = replace(asked, player="base")
    [lost, whole] = play(asked, again, script=by_turn(LS, "ok"), substrate=substrate, max_retries=1)
    assert sorted(substrate.attempts) == ["/s/0/0@0", "/s/0/0@1", "base/s/0/0@0"]
    assert [group.scores[0].value for group in (lost, whole)] == [1.0, 1.0]
    assert len(substrate.boxes) == 4
    assert lost.rollouts[0].failures == ("SandboxLost: the box is gone",)
    assert group_metrics([lost, whole])["repeated_attempts"] == 1.0
    assert rollout_record(lost.rollouts[0], lost.scores[0])["failures"] == ["SandboxLost: the box is gone"]


def test_an_attempt_that_was_the_last_is_no_earlier_one():
    substrate = Keeping(failures=[SandboxLost(f"gone {i}") for i in range(2)])
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), reward=Constant())
    [group] = play(asked, script=by_turn(LS, "ok"), substrate=substrate, max_retries=1)
    [rollout] = group.rollouts
    assert (rollout.failures, rollout.error) == (("SandboxLost: gone 0",), "SandboxLost: gone 1")
    assert group.scores[0].status is ScoreStatus.ROLLOUT_ERROR


def test_tools_run_in_a_real_box():
    substrate = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
    asked = task(sandbox=SandboxSpec(files={"in": b"7"}), expected_files=["out"])
    script = by_turn("```bash\ncat in > out; echo 8 >> out\n```", "```bash\nsleep 60\n```", "done")
    environment = ToolUse(command_timeout_s=0.3)
    [group] = play(job(asked, environment=environment), script=script, substrate=substrate)
    [rollout] = group.rollouts
    assert rollout.artifacts == {"out": b"78\n"}
    assert [t.observations[0]["content"] for t in rollout.turns[:2]] == [
        "(no output)",
        "(no output)\n(killed: timeout)",
    ]


def test_a_command_with_a_nul_byte_is_answered_and_not_a_failure():
    substrate = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), reward=Constant())
    [group] = play(asked, script=by_turn("```bash\nls \0\n```", "done"), substrate=substrate)
    [rollout] = group.rollouts
    assert (rollout.stop, group.scores[0].value) == (StopReason.FINISHED, 1.0)
    assert "NUL" in rollout.turns[0].observations[0]["content"]


@pytest.mark.parametrize(
    ("command", "value", "why"),
    [
        ("rm bad; mkdir bad", 1.0, "All 1"),
        (":", 0.0, "Forbidden file 'bad'"),
        ("seq 100 > bad", 0.0, "Forbidden file 'bad'"),
        ("ln -sf /dev/null bad", 0.0, "Forbidden file 'bad'"),
        ("rm bad; seq 100 > good", 0.0, "'good' has the wrong content"),
        ("rm bad good", 0.0, "'good' is missing"),
    ],
)
def test_forbidden_and_oversized_files_reach_the_grading(command, value, why):
    substrate = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
    asked = task(
        sandbox=SandboxSpec(files={"bad": b"", "good": b""}), expected_files={"good": ""}, forbidden_files=["x/../bad"]
    )
    environment = ToolUse(max_artifact_bytes=64)
    script = by_turn(f"```bash\n{command}\n```", "done")
    [group] = play(job(asked, environment=environment, reward=FinalStateReward()), script=script, substrate=substrate)
    assert group.scores[0].value == value
    assert why in group.scores[0].explanation


@pytest.mark.parametrize("path", ["/etc/passwd", "a/../../b", "."])
def test_a_task_that_names_a_file_outside_the_box_says_so(path):
    asked = task(sandbox=SandboxSpec(), forbidden_files=[path])
    [group] = play(job(asked, environment=ToolUse(), reward=Constant()), substrate=FakeSubstrate())
    assert "below the workdir" in group.rollouts[0].error


def test_a_long_observation_keeps_head_and_tail():
    substrate = FakeSubstrate(answer=lambda command: said("a" * 50 + "b" * 50))
    environment = ToolUse(max_observation_chars=20, max_turns=1)
    [group] = play(job(task(sandbox=SandboxSpec()), environment=environment), script=by_turn(LS), substrate=substrate)
    [observation] = group.rollouts[0].turns[0].observations
    assert observation["content"] == "a" * 10 + "\n(80 characters left out)\n" + "b" * 10


# Why an episode ended


def test_a_turn_without_room_for_its_end_is_cut_off_and_its_command_not_run():
    substrate = FakeSubstrate()
    sampling = Sampling(max_tokens=len(spell(LS)))
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), sampling=sampling)
    [group] = play(asked, script=by_turn(LS), substrate=substrate)
    [rollout] = group.rollouts
    assert (rollout.stop, rollout.failed, len(rollout.turns)) == (StopReason.LENGTH, False, 1)
    assert END not in rollout.turns[0].completion.token_ids
    assert substrate.boxes[0].commands == []


def test_the_budget_of_a_turn_is_what_the_window_has_left():
    prompt = len(tiny_chat().encode_prompt(task().prompt))
    engine = ScriptedEngine(lambda request: "0123456789")
    [group] = play(job(sampling=Sampling(max_tokens=100), max_sequence_tokens=prompt + 4), engine=engine)
    assert engine.requests[0].sampling.max_tokens == 4
    assert group.rollouts[0].stop is StopReason.LENGTH
    assert len(group.rollouts[0].token_ids) == prompt + 4


def test_a_conversation_that_fills_its_window_ends_before_the_next_turn():
    engine = ScriptedEngine(lambda request: LS)
    substrate = FakeSubstrate(answer=lambda command: said("x" * 300))
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), max_sequence_tokens=200, reward=Constant())
    [group] = play(asked, engine=engine, substrate=substrate)
    [rollout] = group.rollouts
    assert (rollout.stop, len(rollout.turns), len(engine.requests)) == (StopReason.LENGTH, 1, 1)
    assert len(rollout.token_ids) <= 200
    assert group.scores[0].value == 1.0


def test_the_last_allowed_turn_ends_the_episode():
    substrate = FakeSubstrate()
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(max_turns=2), reward=Constant())
    [group] = play(asked, script=lambda request: LS, substrate=substrate)
    [rollout] = group.rollouts
    assert (rollout.stop, len(rollout.turns)) == (StopReason.TURNS, 2)
    assert substrate.boxes[0].commands == ["ls", "ls"]
    assert group.scores[0].value == 1.0


@dataclass(frozen=True)
class Waits:
    """An environment that takes its time to answer; a stubborn one does not end when it is told to."""

    seconds: float
    stubborn: bool = False
    max_turns: int = 1

    def start(self, asked: Task, sandbox: Sandbox | None) -> Waits:
        return self

    async def respond(self, text: str) -> None:
        while True:
            try:
                await asyncio.sleep(self.seconds)
                return
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise

    async def artifacts(self) -> Mapping[str, bytes]:
        return {}


def test_a_deadline_is_unscored_and_not_zero():
    reward = Constant()
    [group] = play(job(environment=Waits(30.0), reward=reward), episode_deadline_s=0.05)
    [rollout], [score] = group.rollouts, group.scores
    assert (rollout.stop, rollout.turns) == (StopReason.DEADLINE, ())
    assert "deadline of 0.05 s" in rollout.error
    assert (score.value, score.status, reward.seen) == (None, ScoreStatus.ROLLOUT_ERROR, [])


def test_the_time_in_which_the_model_speaks_is_nobodys_fault():
    [group] = play(job(reward=Constant()), script=lambda request: 0.3, episode_deadline_s=0.05)
    assert not group.rollouts[0].failed
    assert group.scores[0].value == 1.0


def test_an_environment_that_does_not_end_is_left_behind(monkeypatch):
    monkeypatch.setattr("posttrain.rollout.player.GRACE_S", 0.1)
    stubborn, quick = job(environment=Waits(2.0, stubborn=True)), job(reward=Constant(), name="s/1")
    began = time.monotonic()
    left, done = play(stubborn, quick, episode_deadline_s=0.05)
    # The loop's end waits for what was left behind: it is cancelled once more, and sleeps its two seconds.
    assert time.monotonic() - began < 5
    assert left.rollouts[0].stop is StopReason.DEADLINE
    assert "was left behind" in left.rollouts[0].error
    assert done.scores[0].value == 1.0


def test_what_is_wrong_with_the_task_is_not_tried_again():
    environment = Breaks("start", started=[0])
    [group] = play(job(environment=environment, reward=Constant()), max_retries=3)
    assert group.rollouts[0].stop is StopReason.INVALID
    assert (len(environment.started), group.rollouts[0].failures) == (2, ())


def test_a_timeout_of_the_environment_itself_is_not_called_a_deadline():
    [group] = play(job(reward=Constant()), script=lambda request: TimeoutError("socket"))
    assert group.rollouts[0].stop is StopReason.ERROR
    assert group.rollouts[0].error == "TimeoutError: socket"


def test_a_prompt_that_leaves_no_room_is_an_error_that_says_what_to_raise():
    [group] = play(job(task("x" * 50), max_sequence_tokens=20, reward=Constant()))
    assert group.rollouts[0].stop is StopReason.INVALID
    assert "max_sequence_tokens is 20" in group.rollouts[0].error
    assert group.scores[0].value is None


def test_an_empty_completion_is_scored_as_the_policys():
    [group] = play(job(reward=Constant(0.0)), script=lambda request: [END])
    [rollout] = group.rollouts
    assert (rollout.text, rollout.stop, rollout.num_generated) == ("", StopReason.FINISHED, 1)
    assert group.scores[0] == Score(value=0.0)


# What breaks around the policy


@dataclass(frozen=True)
class Breaks:
    """An environment of which every second episode breaks in the way asked for."""

    where: str
    max_turns: int = 3
    started: list[int] = field(default_factory=list)

    def start(self, asked: Task, sandbox: Sandbox | None) -> BreakingEpisode:
        self.started.append(len(self.started))
        breaks = self.started[-1] % 2 == 1
        if breaks and self.where == "start":
            raise KeyError("no such task")
        return BreakingEpisode(self.where if breaks else "")


@dataclass(frozen=True)
class BreakingEpisode:
    where: str

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        if self.where == "respond":
            raise SandboxLost("the box is gone")
        return None

    async def artifacts(self) -> Mapping[str, bytes]:
        if self.where == "artifacts":
            raise OSError("pipe")
        return {}


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("start", "KeyError: 'no such task'"),
        ("respond", "SandboxLost: the box is gone"),
        ("artifacts", "OSError: pipe"),
    ],
)
def test_a_broken_environment_costs_its_own_rollout_alone(where, error):
    [group] = play(job(environment=Breaks(where), reward=Constant(0.5), num_rollouts=4))
    assert [rollout.failed for rollout in group.rollouts] == [False, True, False, True]
    assert [score.value for score in group.scores] == [0.5, None, 0.5, None]
    assert [rollout.error for rollout in group.rollouts] == [None, error, None, error]


def test_a_box_that_does_not_open_is_tried_again_with_the_same_random_numbers():
    engine = ScriptedEngine(lambda request: "done")
    substrate = FakeSubstrate(failures=[SandboxLost("full")])
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), reward=Constant(), num_rollouts=2)
    [group] = play(asked, engine=engine, substrate=substrate, max_retries=1)
    assert [score.value for score in group.scores] == [1.0, 1.0]
    assert sorted((r.id, r.seed) for r in engine.requests) == [("s/0/0/0", 3), ("s/0/1/0", 3)]
    assert substrate.num_open == 0


def test_a_retry_repeats_the_same_requests_in_a_fresh_box_and_gives_up_after_its_retries():
    left = [2]

    def script(request: Request) -> Reply:
        if request.id.endswith("/0"):
            return LS
        left[0] -= 1
        return RuntimeError("engine hiccup") if left[0] >= 0 else "done"

    for retries, scored in ((1, None), (2, 1.0)):
        left[0] = 2
        engine, substrate = ScriptedEngine(script), FakeSubstrate()
        asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), reward=Constant())
        [group] = play(asked, engine=engine, substrate=substrate, max_retries=retries)
        assert group.scores[0].value == scored
        assert [r.id for r in engine.requests] == ["s/0/0/0", "s/0/0/1"] * (retries + 1)
        assert len({tuple(r.prompt_ids) for r in engine.requests if r.id.endswith("/0")}) == 1
        assert [box.commands for box in substrate.boxes] == [["ls"]] * (retries + 1)


def test_a_task_with_tools_but_without_a_box_says_so():
    [group] = play(job(environment=ToolUse(), reward=Constant()))
    assert "has no sandbox" in group.rollouts[0].error
    [group] = play(job(task(sandbox=SandboxSpec()), environment=ToolUse(), reward=Constant()))
    assert "no substrate" in group.rollouts[0].error


def test_boxes_and_episodes_keep_to_their_limits():
    active, most = [0], [0]

    class Counting(ScriptedEngine):
        async def generate(self, request: Request) -> Completion:
            active[0] += 1
            most[0] = max(most[0], active[0])
            await asyncio.sleep(0.001)
            active[0] -= 1
            return await super().generate(request)

    substrate = FakeSubstrate()
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(), num_rollouts=9)
    limits = {"max_concurrent_episodes": 5, "max_concurrent_sandboxes": 2}
    [group] = play(asked, engine=Counting(lambda request: "done"), substrate=substrate, **limits)
    assert not any(rollout.failed for rollout in group.rollouts)
    assert (substrate.most_open, substrate.num_open, len(substrate.boxes)) == (2, 0, 9)
    [group] = play(job(num_rollouts=9), engine=Counting(lambda request: "done"), **limits)
    assert most[0] == 5


def test_all_episodes_of_a_call_reach_the_engine_in_the_order_of_the_jobs():
    engine = ScriptedEngine(lambda request: "ok")
    groups = play(*(job(name=f"s/{i}", num_rollouts=3) for i in range(4)), engine=engine)
    assert [r.id for r in engine.requests] == [f"s/{i}/{k}/0" for i in range(4) for k in range(3)]
    assert [[r.id for r in g.rollouts] for g in groups] == [[f"s/{i}/{k}" for k in range(3)] for i in range(4)]


# Rewards


@dataclass(frozen=True)
class Raises:
    error: BaseException

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        if rollout.id.endswith("/1"):
            raise self.error
        return Score(value=1.0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad column"), ScoreStatus.REWARD_ERROR),
        (TimeoutError("its own"), ScoreStatus.REWARD_ERROR),
        (JudgeError("no reply"), ScoreStatus.JUDGE_ERROR),
        (SandboxLost("gone"), ScoreStatus.SANDBOX_ERROR),
    ],
)
def test_a_reward_that_raises_leaves_one_rollout_unscored(error, status):
    [group] = play(job(reward=Raises(error), num_rollouts=3))
    assert [score.value for score in group.scores] == [1.0, None, 1.0]
    assert group.scores[1].status is status
    assert str(error) in group.scores[1].error


@dataclass(frozen=True)
class Gives:
    """Scores one rollout with what it was made with, alone or as one of a group."""

    answer: Any

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return self.answer if rollout.id.endswith("/1") else Score(value=1)


@dataclass(frozen=True)
class GivesGroup:
    answer: Any

    async def score_group(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        return [await Gives(self.answer).score(rollout) for rollout in rollouts]


@pytest.mark.parametrize("kind", [Gives, GivesGroup])
@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Score(value=math.nan), "Score.value = nan"),
        (Score(value=-math.inf), "Score.value = -inf"),
        (Score(value=10**400), "Score.value = 1000"),
        (Score(value="1"), "Score.value = '1'"),
        (Score(value=np.zeros(2)), "Score.value = array"),
        (Score(value=1.0, parts={"style": "fine"}), "parts = {'style': 'fine'}"),
        (0.5, "gave 0.5"),
        (None, "gave None"),
    ],
)
def test_an_answer_that_no_step_could_use_leaves_its_rollout_unscored(kind, answer, found):
    [group] = play(job(reward=kind(answer), num_rollouts=3))
    assert [score.value for score in group.scores] == [1.0, None, 1.0]
    assert group.scores[1].status is ScoreStatus.REWARD_ERROR
    for words in (kind.__name__, found, "finite number"):
        assert words in group.scores[1].error


@pytest.mark.parametrize("value", [True, np.float32(1), np.bool_(True), np.array(1.0), torch.tensor(1)])
def test_a_value_that_is_a_number_becomes_a_float(value):
    [group] = play(job(reward=Gives(Score(value=value)), num_rollouts=2))
    assert group.scores[1].value == 1.0
    assert type(group.scores[1].value) is float


@dataclass(frozen=True)
class SlowReward:
    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        await asyncio.sleep(30)
        return Score(value=1.0)


def test_a_reward_that_hangs_is_unscored_at_its_deadline():
    [group] = play(job(reward=SlowReward()), reward_deadline_s=0.05)
    assert (group.scores[0].value, group.scores[0].status) == (None, ScoreStatus.TIMEOUT)
    assert "deadline of 0.05 s" in group.scores[0].error


@dataclass(frozen=True)
class GradesInABox:
    sandbox: SandboxSpec = field(default_factory=lambda: SandboxSpec(files={"tests": b"t"}))

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        assert sandbox is not None
        result = await sandbox.exec("grade")
        return Score(value=float(result.ok and await sandbox.list() == ["tests"]))


def test_grading_gets_a_fresh_box_that_the_rollout_never_saw():
    substrate = FakeSubstrate()
    asked = job(task(sandbox=SandboxSpec(files={"work": b""})), environment=ToolUse(), reward=GradesInABox())
    [group] = play(asked, script=by_turn(LS, "done"), substrate=substrate)
    assert group.scores[0].value == 1.0
    assert [box.commands for box in substrate.boxes] == [["ls"], ["grade"]]
    assert substrate.most_open == 1


@dataclass(frozen=True)
class Compares:
    """Ranks the rollouts it is shown by length."""

    extra: int = 0
    error: BaseException | None = None
    seen: list[str] = field(default_factory=list)

    async def score_group(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        self.seen.extend(rollout.id for rollout in rollouts)
        if self.error:
            raise self.error
        return [Score(value=float(len(rollout.text))) for rollout in rollouts] + [Score(value=9.0)] * self.extra


def fails_second(request: Request) -> Reply:
    number = int(request.id.split("/")[2])
    return RuntimeError("lost") if number == 1 else "x" * number


def test_a_comparing_reward_sees_only_what_happened_and_scores_stay_aligned():
    reward = Compares()
    [group] = play(job(reward=reward, num_rollouts=4), script=fails_second)
    assert reward.seen == ["s/0/0", "s/0/2", "s/0/3"]
    assert [score.value for score in group.scores] == [0.0, None, 2.0, 3.0]
    assert group.scores[1].status is ScoreStatus.ROLLOUT_ERROR


@pytest.mark.parametrize(
    ("reward", "words"),
    [(Compares(extra=1), "gave 4 scores for 3 rollouts"), (Compares(error=KeyError("rank")), "KeyError: 'rank'")],
)
def test_a_broken_comparing_reward_leaves_its_group_unscored(reward, words):
    groups = play(
        job(reward=reward, num_rollouts=4), job(reward=Compares(), num_rollouts=2, name="s/1"), script=fails_second
    )
    assert [score.value for score in groups[0].scores] == [None] * 4
    assert words in groups[0].scores[0].error
    assert groups[1].scores[0].value == 0.0


@dataclass(frozen=True)
class AsksThePolicy:
    ask: Ask | None = None

    def with_policy(self, ask: Ask) -> AsksThePolicy:
        return replace(self, ask=ask)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        assert self.ask is not None
        question: list[Message] = [{"role": "user", "content": f"grade {rollout.text}"}]
        reply = await self.ask(question, max_tokens=5, temperature=0.5, seed=11)
        return Score(value=float(reply))


def test_a_reward_judged_by_the_policy_asks_the_snapshot_and_not_the_policy():
    engine, judge = ScriptedEngine(lambda request: "ab"), ScriptedEngine(lambda request: "0.25")
    [group] = play(job(reward=AsksThePolicy(), num_rollouts=2), engine=engine, judge=judge)
    assert [score.value for score in group.scores] == [0.25, 0.25]
    assert len(engine.requests) == 2
    question = tiny_chat().encode_prompt([{"role": "user", "content": "grade ab"}])
    for request in judge.requests:
        assert request.prompt_ids.tolist() == question.tolist()
        assert (request.sampling, request.seed) == (Sampling(temperature=0.5, max_tokens=5), 11)
    assert len({request.id for request in judge.requests}) == 1


def test_a_reward_judged_by_the_policy_without_a_snapshot_is_unscored():
    [group] = play(job(reward=AsksThePolicy()))
    assert (group.scores[0].value, group.scores[0].status) == (None, ScoreStatus.JUDGE_ERROR)


def test_rollouts_without_a_reward_have_no_value():
    groups = play(
        job(num_rollouts=2, reward=None), script=lambda request: RuntimeError("x") if "/1/" in request.id else "a"
    )
    assert [score.value for score in groups[0].scores] == [None, None]
    assert groups[0].scores[1].status is ScoreStatus.ROLLOUT_ERROR


# From groups to samples


def rollout_of(name: str, *, tokens: int = 3, stop: StopReason = StopReason.FINISHED, domain: str = "d") -> Rollout:
    turn = Turn(
        context_ids=np.array([1, 2], np.int32),
        completion=Completion(
            request_id=name,
            token_ids=np.arange(10, 10 + tokens, dtype=np.int32),
            logprobs=np.full(tokens, -0.5, np.float32),
            versions=np.full(tokens, 4, np.int32),
            finish=FinishReason.STOP,
        ),
        text="x",
    )
    return Rollout(id=name, task=Task(id="t", domain=domain, prompt=()), turns=(turn,), stop=stop)


def group_of(*values: float | None, stops: Mapping[int, StopReason] = {}, parts: Any = ()) -> Group:
    rollouts = tuple(rollout_of(f"r{i}", stop=stops.get(i, StopReason.FINISHED)) for i in range(len(values)))
    details = [*parts, *[{}] * (len(values) - len(parts))]
    scores = tuple(Score(value=v, parts=p) for v, p in zip(values, details, strict=True))
    return Group(task=rollouts[0].task, rollouts=rollouts, scores=scores)


def learning(groups: list[Group], config: GRPO) -> list[str]:
    """Ids of the samples that still carry loss."""
    samples = grpo_samples(groups, advantages(groups, config), config)
    return [sample.id for sample in samples if sample.num_loss_tokens]


def advantages(groups: list[Group], config: GRPO, min_group_size: int = 2) -> list[list[float]]:
    return group_advantage_rows(groups, config, min_group_size=min_group_size)


def test_an_unscored_rollout_leaves_baseline_and_update():
    config = GRPO(scale_rewards="none")
    groups = [group_of(1.0, None, 0.0, 0.5)]
    [row] = advantages(groups, config)
    assert math.isnan(row[1])
    np.testing.assert_allclose([row[0], row[2], row[3]], [0.5, -0.5, 0.0], atol=1e-6)
    # The last one has no gradient but is one of the rows that the loss is normalised by.
    assert [s.id for s in grpo_samples(groups, [row], config)] == ["r0", "r2", "r3"]
    assert learning(groups, config) == ["r0", "r2"]


@pytest.mark.parametrize("config", [GRPO(beta=0.1), GRPO(entropy_coef=0.01)])
def test_a_zero_advantage_stays_when_another_term_acts_on_it(config):
    groups = [group_of(1.0, 1.0, None)]
    assert learning(groups, config) == ["r0", "r1"]
    assert learning(groups, GRPO()) == []


def test_a_group_with_too_few_scores_leaves_the_step():
    groups = [group_of(1.0, 0.0, None), group_of(1.0, 0.0, 0.0)]
    rows = advantages(groups, GRPO(), min_group_size=3)
    assert all(math.isnan(value) for value in rows[0])
    assert not any(math.isnan(value) for value in rows[1])


def test_truncated_completions_are_masked_only_when_asked_for():
    groups = [group_of(1.0, 0.0, stops={1: StopReason.LENGTH})]
    for masked, kept in ((True, ["r0"]), (False, ["r0", "r1"])):
        config = GRPO(mask_truncated_completions=masked)
        samples = grpo_samples(groups, advantages(groups, config), config)
        assert learning(groups, config) == kept
        assert len(samples) == 2
        assert all(s.truncated == (s.id == "r1") for s in samples)


def test_a_sample_carries_what_the_rollout_recorded():
    rollout = rollout_of("r", tokens=3)
    sample = sample_of(rollout, advantage=0.25, teacher="math", weight=2.0)
    arrays = sample.load()
    assert arrays.token_ids.tolist() == [1, 2, 10, 11, 12]
    assert arrays.loss_mask.tolist() == [False, False, True, True, True]
    assert arrays.versions.tolist() == [-1, -1, 4, 4, 4]
    assert arrays.logprobs[2:].tolist() == [-0.5] * 3
    assert (len(sample), sample.num_loss_tokens, sample.tokens.version_range) == (5, 3, (4, 4))
    assert (sample.advantage, sample.teacher, sample.weight, sample.task_id) == (0.25, "math", 2.0, "t")


def test_distillation_takes_everything_the_policy_did_and_no_machinery_failure():
    rollouts = [
        rollout_of("right", domain="math"),
        rollout_of("cut", domain="code", stop=StopReason.LENGTH),
        rollout_of("late", domain="math", stop=StopReason.DEADLINE),
        rollout_of("broken", domain="math", stop=StopReason.ERROR),
    ]
    groups = [
        Group(
            task=rollout.task,
            rollouts=(rollout,),
            scores=(Score(value=None),),
            route=Route(teacher=f"{rollout.task.domain}-teacher", weight=0.5),
        )
        for rollout in rollouts
    ]
    samples = distill_samples(groups, scale_of={"code": 4.0})
    assert [(s.id, s.teacher, s.weight) for s in samples] == [
        ("right", "math-teacher", 0.5),
        ("cut", "code-teacher", 2.0),
    ]
    scored = distill_samples(groups, [[0.5], [math.nan], [0.0], [0.0]])
    assert [s.advantage for s in scored] == [0.5, 0.0]
    with pytest.raises(ValueError, match="has no route"):
        distill_samples([replace(groups[0], route=None)])


def test_metrics_count_failures_and_never_average_them_in():
    stops = {1: StopReason.DEADLINE, 2: StopReason.LENGTH}
    groups = [group_of(1.0, None, 0.0, stops=stops, parts=[{"unit": 1.0}, {"unit": None}]), group_of(0.5, 0.5)]
    metrics = group_metrics(groups)
    assert metrics["reward"] == pytest.approx(2.0 / 4)
    assert metrics["reward_std"] == pytest.approx((0.5 + 0.0) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert (metrics["unscored"], metrics["failed_rollouts"]) == (1.0, 1.0)
    assert metrics["truncated"] == pytest.approx(1 / 5)
    assert (metrics["generated_tokens"], metrics["completion_tokens"], metrics["turns"]) == (15.0, 3.0, 1.0)
    assert metrics["reward/unit"] == 1.0


def test_metrics_without_any_score_are_not_a_number_rather_than_zero():
    metrics = group_metrics([group_of(None, None)])
    assert math.isnan(metrics["reward"])
    assert metrics["unscored"] == 2.0


def test_a_single_turn_leaves_no_files():
    assert dict(asyncio.run(SingleTurnEpisode().artifacts())) == {}


def test_a_killed_command_is_described_with_how_it_ended():
    result = ExecResult(status=ExecStatus.OOM, exit_code=None, stdout=b"half")
    substrate = FakeSubstrate(answer=lambda command: result)
    asked = job(task(sandbox=SandboxSpec()), environment=ToolUse(max_turns=1))
    [group] = play(asked, script=by_turn(LS), substrate=substrate)
    assert group.rollouts[0].turns[0].observations[0]["content"] == "half\n(killed: oom)"
