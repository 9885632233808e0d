from dataclasses import dataclass, field

import pytest

from posttrain.config import GRPO, SFT, Domain, Lora, Model, Recipe
from posttrain.errors import RecipeError
from posttrain.overrides import apply_overrides
from posttrain.rollout.environments import SingleTurn
from posttrain.types import SandboxSpec, Score, Task


@dataclass(frozen=True, kw_only=True)
class Tasks:
    digits: int = 2
    limits: SandboxSpec = field(default_factory=SandboxSpec)

    def train(self, *, seed):
        yield Task(id=f"train-{seed}", domain="math", prompt=({"role": "user", "content": "1+1"},))

    def heldout(self, *, count):
        return [Task(id="held", domain="math", prompt=({"role": "user", "content": "1+2"},))]

    def demonstrations(self, *, count, seed):
        return []


@dataclass(frozen=True)
class Reward:
    async def score(self, rollout, sandbox=None):
        return Score(value=1.0)


def recipe() -> Recipe:
    domain = Domain(tasks=Tasks(), reward=Reward(), environment=SingleTurn(), grpo=GRPO())
    return Recipe(name="small", model=Model(path="x"), domains={"math": domain, "more": domain.replace(sft=SFT())})


def changed(*overrides: str) -> Recipe:
    return apply_overrides(recipe(), overrides)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("model.path=org/name", lambda r: r.model.path, "org/name"),
        ("domains.math.grpo.max_steps=3", lambda r: r.domains["math"].grpo.max_steps, 3),
        ("domains.math.grpo.optim.learning_rate=2e-6", lambda r: r.domains["math"].grpo.optim.learning_rate, 2e-6),
        ("domains.*.grpo.beta=0.5", lambda r: [d.grpo.beta for d in r.domains.values()], [0.5, 0.5]),
        ("domains.math.grpo.epsilon_high=0.3", lambda r: r.domains["math"].grpo.epsilon_high, 0.3),
        ("domains.math.grpo=none", lambda r: r.domains["math"].grpo, None),
        ("model.lora.rank=8", lambda r: r.model.lora, Lora(rank=8)),
        ("domains.math.sampling.temperature=0.5", lambda r: r.domains["math"].sampling.temperature, 0.5),
        ("domains.math.tasks.digits=4", lambda r: r.domains["math"].tasks.digits, 4),
        ("workers.max_retries=0", lambda r: r.workers.max_retries, 0),
        ('model.lora={"rank": 2}', lambda r: r.model.lora.rank, 2),
    ],
)
def test_an_override_is_typed_by_its_field(override, read, expected):
    assert read(changed(override)) == expected


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("domains.math.grpo.max_step=3", ["max_step", "did you mean 'max_steps'", "num_generations"]),
        ("domains.maths.grpo.max_steps=3", ["maths", "did you mean 'math'"]),
        ("domains.math.grpo.max_steps=many", ["max_steps=many", "integer"]),
        ("domains.math.grpo.max_steps=0", ["greater than or equal to 1"]),
        ("domains.math.grpo.loss_type=ppo", ["'grpo'", "'dapo'"]),
        ("domains.math.sampling.temperature=-1", ["temperature", ">= 0"]),
        ("domains.math.tasks.digits=x", ["digits=x", "integer"]),
        ("domains.math.grpo.max_steps=many", ["GRPO.max_steps = 'many': expected a valid integer", ". Fields: beta, "]),
        ("domains.math.grpo.xyz=3", ["GRPO has no field 'xyz'. Fields: beta, "]),
        ('domains.math.grpo={"max_step": 3}', ["grpo.max_step = 3", "did you mean 'max_steps'? Fields: beta, "]),
        ("domains.math.tasks.digits=x", ["Tasks.digits = 'x': expected a valid integer", ". Fields: digits"]),
        ("model.lora=8", ["expected a valid dictionary or instance of Lora. Fields: alpha, "]),
        ("domains.math.sampling=8", ["expected a dictionary or an instance of Sampling. Fields: max_tokens, "]),
        ("domains.math.tasks.limits=8", ["Tasks.limits = '8'", "instance of SandboxSpec. Fields: cpus, "]),
        ("domains.math=3", ["whole entry", "Fields: efforts, environment, grpo, "]),
        ("domains.math.weight.x=3", ["domains.math.weight = 1.0 is of type float", "set it as a whole"]),
        ("seed", ["path=value"]),
        ("distill.max_steps=3", ["distill"]),
    ],
)
def test_a_wrong_override_says_what_would_be_right(override, parts):
    with pytest.raises(RecipeError) as problem:
        changed(override)
    for part in parts:
        assert part in str(problem.value)


def test_overrides_leave_the_original_alone():
    before = recipe()
    apply_overrides(before, ["seed=9", "domains.math.tasks.digits=5"])
    assert before == recipe()
