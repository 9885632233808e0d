"""Episodes in the V4 format: parallel calls, mistakes that come back, and what is learned from it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import models
from posttrain.config import GRPO, SFT, Effort, Model, Optim, Recipe, Workers
from posttrain.conversation.dsml import tool_row, write_calls
from posttrain.conversation.effort import HIGH, MAX, NON_THINK
from posttrain.conversation.formats import open_format
from posttrain.conversation.v4 import V4Format
from posttrain.conversation.v4_tokens import BAR, END_THINK, EOS, THINK
from posttrain.conversation.vocabulary import prepare_tokenizer
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.errors import RecipeError, SandboxLost
from posttrain.learner.sft import run_sft
from posttrain.preflight import check_recipe
from posttrain.protocols import Environment, Sandbox
from posttrain.rollout.clearing import ContextClearing
from posttrain.rollout.environments import ToolCalling
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.rundir import RunDir
from posttrain.stages.session import Session
from posttrain.stages.sft import demonstrations_of
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
from tests import mini_recipe
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
    repeats: int = 1
    definitions: Sequence[Tool] = (LOOK, replace(LOOK, name="submit"))

    def start(self, sandbox: Sandbox) -> Looks:
        return self

    async def call(self, call: ToolCall) -> Observation:
        self.asked.append(str(call.arguments))
        return Observation(f"saw {call.arguments}" * self.repeats, {"f": b""} if call.name == "submit" else None)


def play(
    texts: Sequence[str],
    *,
    task: Task | None = None,
    tools: Looks | None = None,
    environment: Environment | None = None,
    window: int = 10_000,
    max_tokens: int = 600,
    failed: bool = False,
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
            sampling=Sampling(max_tokens=max_tokens),
            max_sequence_tokens=window,
        ),
    )
    (group,) = asyncio.run(player.play([job]))
    assert group.rollouts[0].failed is failed, group.rollouts[0].error
    assert (group.scores[0].value is None) is failed
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


NUMBERS = {"type": "object", "properties": {"at": {"type": "integer"}}, "required": ["at"]}


@dataclass
class Counts:
    """Tools that notice how many of them run at once and end in the reverse of their order."""

    definitions: Sequence[Tool] = (
        Tool(name="peek", description="Reads.", parameters=NUMBERS, concurrent=True),
        Tool(name="poke", description="Writes.", parameters=NUMBERS),
    )
    fails: BaseException | None = None
    log: list[str] = field(default_factory=list)

    def start(self, sandbox: Sandbox) -> Counts:
        return self

    async def call(self, call: ToolCall) -> Observation:
        at = call.arguments["at"]
        self.log.append(f"+{at}")
        if at == 9 and self.fails is not None:
            raise self.fails
        await asyncio.sleep(0.03 * (5 - at))
        self.log.append(f"-{at}")
        return Observation(f"{call.name} {at}")


@pytest.mark.parametrize(
    ("max_parallel", "log"),
    [(1, "+1 -1 +2 -2 +3 -3 +4 -4 +5 -5"), (2, "+1 +2 -2 +3 -1 -3 +4 -4 +5 -5"), (9, "+1 +2 +3 -3 -2 -1 +4 -4 +5 -5")],
)
def test_calls_that_may_run_at_once_do_and_are_answered_in_order(max_parallel, log):
    tools = Counts()
    names = ["peek", "peek", "peek", "poke", "peek"]
    calls = [ToolCall(name, {"at": at}) for at, name in enumerate(names, 1)]
    environment = ToolCalling(tools=tools, form="dsml", max_parallel=max_parallel)
    rollout, _ = play([turn(*calls), f"{END_THINK}done{EOS}"], environment=environment)
    assert tools.log == log.split()
    assert [m["content"] for m in rollout.turns[0].observations] == [f"{n} {at}" for at, n in enumerate(names, 1)]


@pytest.mark.parametrize(
    ("failure", "stop"),
    [
        (SandboxLost("gone"), StopReason.ERROR),
        (TimeoutError(), StopReason.ERROR),
        (KeyError("at"), StopReason.INVALID),
    ],
)
def test_what_the_machinery_fails_at_is_never_an_answer(failure, stop):
    tools = Counts(fails=failure)
    calls = [ToolCall("peek", {"at": at}) for at in (1, 9, 2)]
    environment = ToolCalling(tools=tools, form="dsml", max_parallel=3)
    rollout, _ = play([turn(*calls)], environment=environment, failed=True)
    assert rollout.stop is stop
    assert rollout.error.startswith(type(failure).__name__)
    # Those beside it do not go on.
    assert not [entry for entry in tools.log if entry.startswith("-")]


def test_a_call_that_no_tool_takes_is_answered_and_the_others_run():
    tools, before = Counts(), TALLY.sums()
    calls = [
        ToolCall("pok", {"at": 1}),
        ToolCall("poke", {"at": "1"}),
        ToolCall("poke", {}),
        ToolCall("poke", {"at": "x" * 2000}),
        ToolCall("poke", {"at": 5}),
        ToolCall("poke", {"at": 6}),
    ]
    environment = ToolCalling(tools=tools, form="dsml", max_calls=5)
    rollout, _ = play([turn(*calls), f"{END_THINK}done{EOS}"], environment=environment, max_tokens=9000)
    unknown, wrong, missing, long, ran, late = (m["content"] for m in rollout.turns[0].observations)
    assert tools.log == ["+5", "-5"]
    assert unknown == "(not run: there is no tool 'pok'; there are peek, poke)"
    assert wrong == "(not run: poke: arguments.at: '1' is not of type 'integer')"
    assert missing == "(not run: poke: arguments: 'at' is a required property)"
    assert "characters left out" in long
    assert len(long) < 400
    assert (ran, late) == ("poke 5", "(not run: a turn may have 5 calls)")
    refused = {name: TALLY.sums()[name] - before.get(name, 0) for name in ("refused/unknown_tool", "refused/arguments")}
    assert refused == {"refused/unknown_tool": 1, "refused/arguments": 3}


def test_a_long_answer_is_cut_with_a_note_and_the_end_is_announced():
    environment = ToolCalling(tools=Looks(), form="dsml", max_turns=3, warn_turns=2, max_answer_chars=40)
    rollout, _ = play([turn(ToolCall("look", {"at": "z" * 99}))] * 3, environment=environment)
    said = [turn_.observations[-1]["content"].split("\n") for turn_ in rollout.turns]
    assert rollout.stop is StopReason.TURNS
    assert said[0][1] == "(73 characters left out)"
    assert [lines[3:] for lines in said] == [["(2 turns left)"], ["(1 turn left)"], []]


def test_settings_and_schemas_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="max_calls = 0"):
        ToolCalling(tools=Looks(), max_calls=0)
    with pytest.raises(ValueError, match="form = 'xml'"):
        ToolCalling(tools=Looks(), form="xml")
    for setting in ({"at": 0}, {"share": 1.5}, {"what": "all"}):
        with pytest.raises(ValueError, match=f"ContextClearing.{min(setting)}"):
            ContextClearing(**setting)
    broken = replace(LOOK, parameters={"type": "objekt"})
    rollout, _ = play([""], environment=ToolCalling(tools=Looks(definitions=(broken,))), failed=True)
    assert rollout.stop is StopReason.INVALID
    assert "tool 'look': parameters are no JSON schema" in rollout.error


CLEARED = "(gone)"


@pytest.mark.parametrize(
    ("clearing", "keeps"),
    [
        (ContextClearing(at=0.8, share=0.5, note=CLEARED), "results"),
        (ContextClearing(at=0.8, share=0.75, what="turns"), "some turns"),
        (ContextClearing(at=0.8, share=1, what="turns"), "no turn"),
    ],
)
def test_a_full_window_is_cleared_and_every_sequence_is_trained_on(clearing, keeps):
    texts = [turn(ToolCall("look", {"at": i}), thought=f"t{i}") for i in range(8)]
    texts.append(f"so{END_THINK}done{EOS}")
    window = len(chat().encode_prompt(PROMPT)) + 3000
    without = ToolCalling(tools=Looks(repeats=30), form="dsml", max_turns=20)
    cut, _ = play(texts, environment=without, window=window)
    assert cut.stop is StopReason.LENGTH
    rollout, engine = play(texts, environment=replace(without, clearing=clearing), window=window)
    assert (rollout.stop, rollout.num_turns) == (StopReason.FINISHED, len(texts))
    assert rollout.turns[0].restarts is False
    restarts = [index for index, each in enumerate(rollout.turns) if each.restarts]
    assert restarts
    for index in restarts:
        # What the policy saw is the same conversation written anew, but for what was cleared.
        shown = chat().tokenizer.decode(engine.shown[index])
        assert len(engine.shown[index]) < window * clearing.at
        messages, lost = list(PROMPT), 0
        for i, past in enumerate(rollout.turns[:index]):
            said = chat().parse(past.completion.token_ids).message
            gone = f"t{i}{END_THINK}" not in shown if clearing.what == "turns" else f"saw {{'at': {i}" not in shown
            lost += gone
            if gone and clearing.what == "turns":
                continue
            heard = [{**m, "content": CLEARED} if gone else m for m in past.observations]
            messages += [said, *heard]
        assert engine.shown[index].tolist() == chat().encode_prompt(messages).tolist()
        least = {"results": index / 2, "some turns": index * 0.75, "no turn": index}[keeps]
        assert least <= lost <= (index if keeps == "no turn" else index - 1)
    arrays = rollout.tokens.load()
    assert len(arrays.lengths) == len(restarts) + 1
    assert max(arrays.lengths) <= window
    assert chat().tokenizer.decode(arrays.token_ids[arrays.loss_mask]) == "".join(texts)


def test_what_cannot_be_cleared_ends_with_the_window():
    answers = [turn(ToolCall("look", {"at": "1" * 500}), thought="t")] * 2
    window = len(chat().encode_prompt(PROMPT)) + 900
    environment = ToolCalling(tools=Looks(), form="dsml", clearing=ContextClearing())
    rollout, _ = play(answers, environment=environment, window=window)
    assert (rollout.stop, rollout.num_turns) == (StopReason.LENGTH, 1)


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


BUDGETS = {NON_THINK: 3, HIGH: 4, "90": 8}


def modes_recipe(tmp_path: Path) -> Recipe:
    """Tasks played in three modes."""
    recipe = mini_recipe.recipe()
    domain = recipe.domains["vowels"]
    assert domain.grpo is not None
    penalty = OverlongPenalty(max_tokens=4, cache_tokens=4)
    efforts = {
        NON_THINK: Effort(sampling=Sampling(max_tokens=3), length_penalty=penalty),
        HIGH: Effort(share=1e-9),
        "90": Effort(sampling=Sampling(max_tokens=8), max_sequence_tokens=200),
    }
    domain = domain.replace(grpo=domain.grpo.replace(num_generations=6), efforts=efforts)
    model = Model(path=save_tiny_model(tmp_path / "base"), chat="v4", dtype="float32")
    return recipe.replace(model=model, domains={"vowels": domain})


def test_the_rollouts_of_a_group_take_the_modes_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    recipe = modes_recipe(tmp_path)
    check_recipe(recipe)
    run = RunDir(tmp_path / "run")
    session = Session(recipe=recipe, run=run, metrics=MetricsLog(run), progress=Progress())
    task = next(iter(recipe.domains["vowels"].tasks.train(seed=0)))
    engine = Says(["a" * 20])
    player = Player(engine=engine, judge_engine=None, chat=chat(), substrate=None, workers=Workers())
    (group,) = asyncio.run(player.play([session.job("g/0", task, num_rollouts=6)]))
    played = zip([*BUDGETS] * 2, group.rollouts, group.scores, engine.shown, strict=True)
    for effort, rollout, score, shown in played:
        assert (rollout.task.effort, rollout.num_generated) == (effort, BUDGETS[effort])
        assert shown.tolist() == chat().at(effort).encode_prompt(task.prompt).tolist()
        assert score.value == (1 - 0.75 if effort == NON_THINK else 1)
        assert score.parts.get("length_penalty") == (-0.75 if effort == NON_THINK else None)
    jobs = [session.job(f"distill/{i}", task, num_rollouts=1, scored=False) for i in range(40)]
    assert {job.task.effort for job in jobs} == {NON_THINK, "90"}
    assert {job.task.effort: job.play.max_sequence_tokens for job in jobs} == {NON_THINK: 64, "90": 200}
    own = session.job("g/1", replace(task, effort=HIGH), num_rollouts=6)
    assert (own.variants, own.play.sampling.max_tokens) == ((), 4)


def test_demonstrations_take_the_modes_in_turn(tmp_path):
    domain = modes_recipe(tmp_path).domains["vowels"]
    assert domain.sft is not None
    modes = [demonstration[0]["effort"] for demonstration in demonstrations_of(domain, domain.sft, 0)]
    assert modes[:6] == [*BUDGETS] * 2


def test_modes_that_do_not_fit_together_are_refused(tmp_path):
    domain = modes_recipe(tmp_path).domains["vowels"]
    for num_generations in (3, 8):
        with pytest.raises(ValueError, match="expected a multiple of their number"):
            domain.replace(grpo=GRPO(num_generations=num_generations))
    hot = Effort(sampling=Sampling(temperature=0.5))
    with pytest.raises(ValueError, match="since the learner has one"):
        domain.replace(efforts={HIGH: hot})
    with pytest.raises(ValueError, match="effort = 'most'"):
        domain.replace(efforts={"most": Effort()})


def test_a_model_learns_to_call_from_demonstrations(tmp_path, monkeypatch):
    """From a base without the tokens to one that makes a call of its own: SFT, its checkpoint, the engine."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    base = models.base_path(Model(path=save_tiny_model(tmp_path / "base"), chat="v4"))
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
