"""The README's snippets run as they stand."""

import asyncio
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import rewards.cli
import sandbox.cli
from posttrain.cli import _parser
from posttrain.config import Recipe
from posttrain.loader import load_recipe
from posttrain.protocols import GroupReward
from posttrain.types import Completion, FinishReason, Rollout, StopReason, Task, Turn
from rewards.rubric import Rubric

ROOT = Path(__file__).parent.parent


def snippets(language: str, path: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


def rollout(text: str) -> Rollout:
    nothing = np.zeros(0, np.int32)
    completion = Completion(
        request_id="r",
        token_ids=nothing,
        logprobs=np.zeros(0, np.float32),
        versions=nothing,
        finish=FinishReason.STOP,
    )
    task = Task(id="t", domain="d", prompt=({"role": "user", "content": "q"},))
    turn = Turn(context_ids=nothing, completion=completion, text=text)
    return Rollout(id="r", task=task, turns=(turn,), stop=StopReason.FINISHED)


def test_the_recipe_loads(tmp_path):
    (source,) = [snippet for snippet in snippets("python") if "def recipe" in snippet]
    (tmp_path / "readme_recipe.py").write_text(source)
    assert isinstance(load_recipe(str(tmp_path / "readme_recipe.py")), Recipe)


def test_the_rubric_loads(tmp_path):
    (text,) = snippets("toml")
    (tmp_path / "referee.toml").write_text(text)
    assert [criterion.id for criterion in Rubric.load(tmp_path / "referee.toml").criteria] == ["evidence", "short"]


def test_the_rewards_score():
    (source,) = [snippet for snippet in snippets("python") if "class Brief" in snippet]
    names: dict = {"__name__": "readme_reward"}
    exec(source, names)
    brief = names["Brief"]()
    assert [asyncio.run(brief.score(rollout(text))).value for text in ("short", "a " * 11)] == [1.0, 0.0]
    reward = names["reward"]
    assert isinstance(reward, GroupReward)
    scores = asyncio.run(reward.score_group([rollout("Yes."), rollout("No")]))
    assert [score.value for score in scores] == [1.0, 0.0]


COMMANDS = [
    line for path in ("README.md", "rewards/README.md") for block in snippets("sh", path) for line in block.splitlines()
]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("posttrain ")])
def test_the_commands_parse(line):
    _, *arguments = shlex.split(line, comments=True)
    brought = {"sandbox": sandbox.cli, "rewards": rewards.cli}.get(arguments[0])
    parser = _parser() if brought is None else brought._parser()
    assert callable(parser.parse_args(arguments if brought is None else arguments[1:]).command)
