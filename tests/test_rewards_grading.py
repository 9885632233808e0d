"""Grading in a fresh box: what a policy did to its own changes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from posttrain.config import Workers
from posttrain.conversation.tool_calls import format_tool_call
from posttrain.errors import RecipeError, SandboxError
from posttrain.rollout.environments import ToolCalling
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.types import (
    ExecResult,
    ExecStatus,
    Group,
    Request,
    Rollout,
    Sampling,
    SandboxSpec,
    Score,
    StopReason,
    Task,
    ToolCall,
)
from rewards.grading import HiddenTests
from sandbox.process import Process
from sandbox.tools import BoxTools
from tests.boxes import require
from tests.tiny_models import FakeSubstrate, ScriptedEngine, tiny_chat

RIGHT = "def f(x):\n    return 2 * x\n"
WRONG = "def f(x):\n    return x\n"
RUN = "import json, sys, solution\nprint(json.dumps(solution.f(int(sys.stdin.read()))))\n"
COMMAND = "PYTHONPATH=. python3 tests/run.py"
INFO = {
    "artifacts": ["solution.py"],
    "hidden_files": {"tests/run.py": RUN},
    "cases": [{"command": COMMAND, "stdin": str(x), "stdout": str(2 * x)} for x in (3, 5)],
}
REWARD = HiddenTests(sandbox=SandboxSpec(timeout_s=20.0))


@pytest.fixture(scope="module")
def isolated() -> Process:
    return require(Process())


def task(**info: Any) -> Task:
    prompt = ({"role": "user", "content": "double"},)
    return Task(id="t", domain="d", prompt=prompt, sandbox=SandboxSpec(timeout_s=20.0), info={**INFO, **info})


def play(substrate: Any, asked: Task, *commands: str, submitted: tuple[str, ...] = ("solution.py",)) -> Group:
    """An agent that runs commands and hands in files, scored."""
    calls = [ToolCall("bash", {"command": command}) for command in commands]
    calls.append(ToolCall("submit", {"paths": list(submitted)}))

    def script(request: Request) -> str:
        return format_tool_call(calls[int(request.id.rpartition("/")[2])])

    environment = ToolCalling(tools=BoxTools(timeout_s=20.0))
    play = Play(environment=environment, reward=REWARD, sampling=Sampling(max_tokens=2000), max_sequence_tokens=20_000)
    player = Player(
        engine=ScriptedEngine(script), judge_engine=None, chat=tiny_chat(), substrate=substrate, workers=Workers()
    )
    job = GroupJob(id="s", task=asked, num_rollouts=1, play=play, seed=1)
    [group] = asyncio.run(player.play([job]))
    assert group.rollouts[0].stop is StopReason.FINISHED, group.rollouts[0].error
    return group


def write(path: str, text: str) -> str:
    return f"cat > {path} <<'END'\n{text}END"


LIES = "import sys\nsys.stdout.write('6\\n')\nsys.stdout.flush()\nimport os\nos._exit(0)\n"
ATTACKS = {
    "another python and bash": (
        "mkdir bin; printf '#!/bin/sh\\necho 6\\n' > bin/python3; chmod 755 bin/python3; cp bin/python3 bin/bash\n"
        "export PATH=/work/bin:$PATH; cp bin/python3 /usr/bin/python3; cp bin/bash /bin/bash; true",
        ("bin/python3",),
    ),
    "sitecustomize": (write("sitecustomize.py", LIES), ("sitecustomize.py",)),
    "a module that shadows": (write("json.py", LIES), ("json.py", "tests/run.py")),
    "another solution beside the tests": (write("tests/solution.py", RIGHT), ("tests/solution.py",)),
    "other tests": (write("tests/run.py", "print(6)\n"), ("tests/run.py",)),
    "processes left running": (
        "for i in 1 2 3; do\n"
        "setsid sh -c 'while :; do echo \"print(6)\" > $0; mv $0 tests/run.py; sleep 0.01; done' new$i &\n"
        "done; sleep 0.2",
        (),
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_done_to_the_box_does_not_change_the_grade(isolated, attack):
    command, planted = ATTACKS[attack]
    tests = f"mkdir tests\n{write('tests/run.py', RUN)}"
    groups = [
        play(
            isolated,
            task(),
            write("solution.py", solution),
            tests,
            f"echo 3 | {COMMAND}",
            command,
            f"echo 3 | {COMMAND}",
            submitted=("solution.py", *planted),
        )
        for solution in (RIGHT, WRONG)
    ]
    # Graded where it was made, the wrong solution would pass.
    told = [turn.observations[0]["content"] for turn in groups[1].rollouts[0].turns[:-1]]
    assert (told[2], told[4]) == ("3", "6")
    assert [group.scores[0].value for group in groups] == [1.0, 0.0]
    assert groups[1].scores[0].explanation == "0 of 2 cases pass; case 0 prints '3\\n'."


def test_hidden_files_are_not_in_the_box_the_policy_works_in(isolated):
    look = "find / -name run.py -not -path '/proc/*' 2> /dev/null; grep -rs solution.f /work /tmp /dev/shm; echo done"
    group = play(isolated, task(), look, write("solution.py", RIGHT))
    assert group.rollouts[0].turns[0].observations[0]["content"] == "done"
    assert group.scores[0].value == 1.0
    shown = task(hidden_files={"tests/run.py": RIGHT})
    asked = dataclasses.replace(shown, sandbox=SandboxSpec(files={"elsewhere.py": RIGHT.encode()}))
    with pytest.raises(RecipeError, match=r"hidden_files'\]\['tests/run.py'\] is also in the box"):
        grade(isolated, asked, {"solution.py": b""})


def grade(substrate: Any, asked: Task, artifacts: Mapping[str, bytes], reward: HiddenTests = REWARD) -> Score:
    async def score() -> Score:
        rollout = Rollout(id="r", task=asked, turns=(), stop=StopReason.FINISHED, artifacts=artifacts)
        async with substrate.open(reward.sandbox) as box:
            return await reward.score(rollout, box)

    return asyncio.run(score())


@pytest.mark.parametrize(
    ("solution", "why"),
    [
        ("import os\nos._exit(0)\n", "case 0 prints ''"),
        ("import os\nprint(6, flush=True)\nos._exit(0)\n", "1 of 2 cases pass; case 1 prints '6\\n'"),
        ("while True: pass\n", "case 0 ended with timeout"),
        ("x" * 2000, "exits with 1 instead of 0"),
        ("x" * 2001, "hold more than 2000 bytes"),
        (
            # Tampers with what the next case runs, which is put back, or cannot be.
            "open('tests/run.py', 'w').write('print(10)')\ndef f(x): return 6\n",
            "1 of 2 cases pass; case 1 prints '6\\n'",
        ),
        (
            "import os\nos.rename('tests', 'old')\nos.symlink('old', 'tests')\ndef f(x): return 6\n",
            "1 of 2 cases pass; case 1 cannot start: tests/run.py",
        ),
    ],
)
def test_what_the_work_does_in_the_grading_box_is_its_own_loss(isolated, solution, why):
    reward = HiddenTests(sandbox=SandboxSpec(timeout_s=1.0), max_artifact_bytes=2000)
    score = grade(isolated, task(), {"solution.py": solution.encode()}, reward)
    assert score.value == 0.0
    assert why in score.explanation


def test_partial_credit_and_the_parts_that_explain_it(isolated):
    reward = HiddenTests(sandbox=SandboxSpec(timeout_s=20.0), partial=True)
    score = grade(isolated, task(), {"./solution.py": b"def f(x): return 6"}, reward)
    assert (score.value, score.parts) == (0.5, {"case_0": 1.0, "case_1": 0.0})
    assert grade(isolated, task(), {"other.py": b""}).explanation == "'solution.py' was not handed in."


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"cases": []}, "1 artifacts and 0 cases"),
        ({"artifacts": []}, "0 artifacts and 2 cases"),
        ({"artifacts": ["../x"]}, r"info\['artifacts'\] names '../x'"),
        ({"hidden_files": {"/etc/x": ""}}, r"info\['hidden_files'\] names '/etc/x'"),
        ({"cases": [{"command": "true"}]}, "'command' and 'stdout'"),
        ({"cases": [{"command": "true", "stdout": 1}]}, "'command' and 'stdout'"),
        ({"cases": [{"command": "true", "stdout": "\n"}]}, "a program that does nothing prints, too"),
        ({"cases": [{"command": "true", "stdout": "", "retry": 1}]}, "'command' and 'stdout'"),
    ],
)
def test_a_task_that_cannot_be_graded_says_why(info, why):
    with pytest.raises(RecipeError, match=why):
        grade(FakeSubstrate(), task(**info), {"solution.py": b""})


def test_a_box_that_fails_is_not_a_grade(isolated):
    small = HiddenTests(sandbox=SandboxSpec(disk_mb=1))
    cancelled = ExecResult(status=ExecStatus.CANCELLED, exit_code=None)
    with pytest.raises(SandboxError, match="was cancelled"):
        grade(FakeSubstrate(answer=lambda command: cancelled), task(), {"solution.py": b""})
    with pytest.raises(SandboxError, match=r"'tests/run\.py' could not be put into the grading box: .*No space"):
        grade(isolated, task(hidden_files={"tests/run.py": "x" * (2 << 20)}), {"solution.py": b""}, small)
    rollout = Rollout(id="r", task=task(), turns=(), stop=StopReason.FINISHED, artifacts={"solution.py": b""})
    with pytest.raises(SandboxError, match="got no sandbox"):
        asyncio.run(REWARD.score(rollout))
