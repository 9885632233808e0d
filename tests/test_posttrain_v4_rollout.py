"""Episodes in the V4 format: parallel calls, mistakes that come back, and what is learned from it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch

from posttrain import models
from posttrain.config import SFT, Domain, Effort, Optim, Workers
from posttrain.conversation.dsml import tool_row, write_calls
from posttrain.conversation.effort import HIGH, MAX, NON_THINK
from posttrain.conversation.formats import open_format
from posttrain.conversation.v4 import V4Format
from posttrain.conversation.v4_tokens import BAR, END_THINK, EOS, THINK
from posttrain.conversation.vocabulary import prepare_tokenizer
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.errors import RecipeError
from posttrain.learner.sft import run_sft
from posttrain.protocols import Environment, Sandbox
from posttrain.rollout.environments import SingleTurn, ToolCalling
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.tally import TALLY
from posttrain.types import (
    Completion,
    FinishReason,
    Message,
    Observation,
    Request,
    Rollout,
    Sampling,
    SandboxSpec,
    StopReason,
    Task,
    Tool,
    ToolCall,
)
from rewards.dsml import DsmlFormat
from rewards.length import OverlongPenalty
from tests.tiny_models import FakeSubstrate, save_tiny_model, tiny_tokenizer

LOOK = Tool(name="look", description="Looks.", parameters={"type": "object"})
PROMPT: tuple[Message, ...] = (
    {"role": "system", "content": "s", "tools": [tool_row(LOOK)]},
    {"role": "user", "content": "u"},
)


@cache
def chat() -> V4Format:
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer)
    return V4Format(tokenizer)


@dataclass
class Says:
    """An engine that says these texts, turn by turn, and remembers what it was shown."""

    texts: Sequence[str]
    shown: list[np.ndarray] = field(default_factory=list)

    async def generate(self, request: Request) -> Completion:
        self.shown.append(request.prompt_ids)
        text = self.texts[int(request.id.rpartition("/")[2])]
        ids = np.array(chat().tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        ids = ids[: request.sampling.max_tokens]
        ended = ids[-1] in chat().stop_ids
        return Completion(
            request_id=request.id,
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            versions=np.zeros(len(ids), np.int32),
            finish=FinishReason.STOP if ended else FinishReason.LENGTH,
        )

    def forget(self, prefix: str) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Looks:
    """A tool that says what it was asked, and one that hands in."""

    asked: list[str] = field(default_factory=list)
    definitions: Sequence[Tool] = (LOOK, replace(LOOK, name="submit"))

    def start(self, sandbox: Sandbox) -> Looks:
        return self

    async def call(self, call: ToolCall) -> Observation:
        self.asked.append(str(call.arguments))
        return Observation(f"saw {call.arguments}", {"f": b""} if call.name == "submit" else None)


def play(
    texts: Sequence[str],
    *,
    task: Task | None = None,
    tools: Looks | None = None,
    environment: Environment | None = None,
) -> tuple[Rollout, Says]:
    engine = Says(texts)
    task = task or Task(id="t", domain="d", prompt=PROMPT, sandbox=SandboxSpec())
    player = Player(
        engine=engine, judge_engine=None, chat=chat(), substrate=FakeSubstrate(), workers=Workers(max_retries=0)
    )
    job = GroupJob(
        id="g",
        task=task,
        num_rollouts=1,
        seed=0,
        play=Play(
            environment=environment or ToolCalling(tools=tools or Looks(), form="dsml", max_turns=5),
            reward=DsmlFormat(),
            sampling=Sampling(max_tokens=600),
            max_sequence_tokens=10_000,
        ),
    )
    (group,) = asyncio.run(player.play([job]))
    assert group.rollouts[0].error is None
    return group.rollouts[0], engine


def turn(*calls: ToolCall, thought: str = "hm") -> str:
    return f"{thought}{END_THINK}\n\n{write_calls(calls)}{EOS}"


def test_parallel_calls_run_in_order_and_are_answered_in_it():
    tools = Looks()
    calls = [ToolCall("look", {"at": "ab"}), ToolCall("look", {"at": 2})]
    rollout, engine = play([turn(*calls), f"so{END_THINK}done{EOS}"], tools=tools)
    assert tools.asked == ["{'at': 'ab'}", "{'at': 2}"]
    answers: list[Message] = [{"role": "tool", "content": f"saw {asked}"} for asked in tools.asked]
    assert rollout.stop is StopReason.FINISHED
    assert rollout.turns[0].observations == tuple(answers)
    # What the engine was shown is what a prompt of the whole conversation would be.
    said = chat().parse(rollout.turns[0].completion.token_ids).message
    assert engine.shown[1].tolist() == chat().encode_prompt([*PROMPT, said, *answers]).tolist()
    assert rollout.text == f"{THINK}so{END_THINK}done"


def test_what_cannot_be_read_comes_back_and_runs_nothing():
    tools, before = Looks(), TALLY.sums()
    broken = turn(ToolCall("look", {"at": [1]})).replace("[1]", "[1")
    rollout, engine = play([broken, turn(ToolCall("look", {})), f"{END_THINK}done{EOS}"], tools=tools)
    (answer,) = rollout.turns[0].observations
    assert answer["content"].startswith("(not run: the value of 'at' in look is no JSON")
    assert "<tool_result>(not run" in chat().tokenizer.decode(engine.shown[1])
    assert tools.asked == ["{}"]
    assert TALLY.sums()["malformed/json"] == before.get("malformed/json", 0) + 1


def test_what_can_be_mended_runs_and_is_counted():
    tools, before = Looks(), TALLY.sums().get("repaired/wrapper", 0)
    play([turn(ToolCall("look", {"at": 1})).replace("tool_calls", "toolcalls"), f"{END_THINK}done{EOS}"], tools=tools)
    assert tools.asked == ["{'at': 1}"]
    assert TALLY.sums()["repaired/wrapper"] == before + 1


def test_handing_in_ends_the_episode_amid_other_calls():
    tools = Looks()
    calls = [ToolCall("look", {}), ToolCall("submit", {}), ToolCall("look", {"at": 3})]
    rollout, _ = play([turn(*calls)], tools=tools)
    assert (len(tools.asked), rollout.artifacts, rollout.num_turns) == (2, {"f": b""}, 1)


@pytest.mark.parametrize("text", [f"{END_THINK}The tag is <|DSML|tool_calls>.{EOS}", f"no end{EOS}"])
def test_a_turn_without_a_call_ends_the_episode(text):
    rollout, _ = play([text])
    assert (rollout.num_turns, rollout.stop) == (1, StopReason.FINISHED)


@dataclass(frozen=True)
class Interview:
    """A user who asks on."""

    questions: Sequence[str]
    max_turns: int = 9

    def start(self, task: Task, sandbox: Sandbox | None) -> Interviewer:
        return Interviewer(iter(self.questions))


@dataclass
class Interviewer:
    questions: Iterator[str]

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        question = next(self.questions, None)
        return None if question is None else ({"role": "user", "content": question},)

    async def artifacts(self) -> Mapping[str, bytes]:
        return {}


def test_a_rollout_goes_on_without_the_reasoning_that_a_user_message_drops():
    asked: tuple[Message, ...] = ({"role": "user", "content": "u"},)
    said = [f"r{i}{END_THINK}c{i}{EOS}" for i in range(3)]
    rollout, engine = play(said, task=Task(id="t", domain="d", prompt=asked), environment=Interview(["v", "w"]))
    messages = list(asked)
    for i, shown in enumerate(engine.shown):
        assert shown.tolist() == chat().encode_prompt(messages).tolist()
        answer: Message = {"role": "assistant", "content": f"c{i}", "reasoning": f"r{i}"}
        messages += [answer, *rollout.turns[i].observations]
    # Each turn carries loss in the sequence it was drawn in, and each sequence is what the policy saw and said.
    arrays = rollout.tokens.load()
    assert [turn.restarts for turn in rollout.turns] == [False, True, True]
    parts = np.split(arrays.token_ids, np.cumsum(arrays.lengths)[:-1])
    masks = np.split(arrays.loss_mask, np.cumsum(arrays.lengths)[:-1])
    for shown, part, mask, text in zip(engine.shown, parts, masks, said, strict=True):
        assert part[: len(shown)].tolist() == shown.tolist()
        assert chat().tokenizer.decode(part[mask]) == text
    assert rollout.num_generated == sum(map(np.sum, masks))


def test_a_user_message_drops_nothing_where_tools_are_declared():
    rollout, engine = play(
        [f"r{END_THINK}c{EOS}", f"{END_THINK}d{EOS}"],
        task=Task(id="t", domain="d", prompt=PROMPT),
        environment=Interview(["v"]),
    )
    assert rollout.tokens.load().starts is None
    assert chat().tokenizer.decode(engine.shown[1]).count(f"{THINK}r{END_THINK}c") == 1


def score(*texts: str) -> tuple[float | None, str]:
    rollout, _ = play(texts)
    verdict = asyncio.run(DsmlFormat().score(rollout))
    assert sum(verdict.parts.values()) == pytest.approx(1)
    return verdict.value, verdict.explanation


def test_the_format_reward_tells_strict_from_mended_from_malformed():
    good, last = turn(ToolCall("look", {"at": 1})), f"{END_THINK}done{EOS}"
    assert score(good, last) == (1.0, "2 of 2 turns are as they should be.")
    mended = good.replace(BAR, "|").replace(EOS.replace(BAR, "|"), EOS)
    assert score(mended, last) == (0.75, "1 of 2 turns are as they should be; look-alike bars (1).")
    broken = good.replace("invoke>", "invok>")
    assert score(broken, last) == (0.5, "1 of 2 turns are as they should be; parameter (1).")
    assert score(f"never closed{EOS}") == (0.0, "0 of 1 turns are as they should be; think (1).")
    assert score(f"{END_THINK}a{THINK}b{EOS}")[0] == 0.0
    assert score(f"{END_THINK}" + "long" * 200)[0] == 1.0
    with pytest.raises(RecipeError, match="from 0 to 1"):
        DsmlFormat(repaired=2)


def test_an_effort_mode_has_its_own_beginning():
    for effort, begin in ((NON_THINK, END_THINK), (MAX, THINK)):
        task = Task(id="t", domain="d", prompt=PROMPT, effort=effort, sandbox=SandboxSpec())
        _, engine = play([f"{END_THINK}done{EOS}"], task=task)
        assert engine.shown[0].tolist() == chat().at(effort).encode_prompt(PROMPT).tolist()
        assert chat().tokenizer.decode(engine.shown[0][-1:]) == begin


def test_an_effort_mode_has_its_own_sampling_window_and_penalty():
    domain = Domain(
        tasks=_Nothing(),
        reward=DsmlFormat(),
        environment=SingleTurn(),
        efforts={MAX: Effort(sampling=Sampling(max_tokens=9), max_sequence_tokens=99), HIGH: Effort()},
    )
    assert [domain.sampling_at(e).max_tokens for e in (None, HIGH, MAX)] == [256, 256, 9]
    assert [domain.window_at(e) for e in (None, HIGH, MAX)] == [1024, 1024, 99]
    with pytest.raises(ValueError, match="effort = 'most'"):
        domain.replace(efforts={"most": Effort()})
    play_ = Play(
        environment=SingleTurn(),
        reward=DsmlFormat(),
        sampling=Sampling(),
        max_sequence_tokens=10_000,
        length_penalty=OverlongPenalty(max_tokens=12, cache_tokens=10),
    )
    player = Player(
        engine=Says([f"{END_THINK}12345{EOS}"]), judge_engine=None, chat=chat(), substrate=None, workers=Workers()
    )
    job = GroupJob(id="g", task=Task(id="t", domain="d", prompt=PROMPT), num_rollouts=1, seed=0, play=play_)
    (group,) = asyncio.run(player.play([job]))
    assert (group.scores[0].value, group.scores[0].parts["length_penalty"]) == (0.5, -0.5)


class _Nothing:
    def train(self, *, seed: int) -> list[Task]:
        return []

    def heldout(self, *, count: int) -> list[Task]:
        return []

    def demonstrations(self, *, count: int, seed: int) -> list[tuple[Message, ...]]:
        return []


def test_a_model_learns_to_call_from_demonstrations(tmp_path, monkeypatch):
    """From a base without the tokens to one that makes a call of its own: SFT, its checkpoint, the engine."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    base = models.base_path(save_tiny_model(tmp_path / "base"), "v4")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
    asked: tuple[Message, ...] = ({"role": "user", "content": "u", "effort": NON_THINK},)
    demonstration = (*asked, {"role": "assistant", "content": "", "tool_calls": [call]})
    final = run_sft(
        model_path=base,
        demonstrations=[demonstration],
        config=SFT(max_steps=45, batch_size=1, optim=Optim(learning_rate=1e-2), save_steps=45),
        lora=None,
        seed=0,
        output_dir=tmp_path / "sft",
        on_log=lambda step, metrics: None,
        dtype=torch.float32,
    )
    form = open_format(models.load_tokenizer(str(final)))
    assert isinstance(form, V4Format)
    engine = TransformersEngine(models.load_model(str(final), torch.float32), stop_ids=form.stop_ids, max_length=256)
    prompt = form.at(NON_THINK).encode_prompt(asked)
    request = Request(id="r", prompt_ids=prompt, sampling=Sampling(temperature=0, max_tokens=200))
    try:
        completion = asyncio.run(engine.generate(request))
    finally:
        engine.close()
    assert completion.finish is FinishReason.STOP
    assert form.at(NON_THINK).parse(completion.token_ids).calls == [ToolCall("f", {"a": "x"})]
