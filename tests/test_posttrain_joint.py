"""Judge prompts in a GRPO stage: what is drawn, credited, dropped and replaced, and that kills change none of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.config import Workers
from posttrain.errors import RecipeError
from posttrain.loader import load_recipe
from posttrain.preflight import check_recipe
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.rundir import RunDir
from posttrain.stages.grpo import Training, open_stream
from posttrain.stages.judging import JudgePool, Judging, credit_both_orders, is_informative, judge_task
from posttrain.stages.session import Position, Session
from posttrain.types import Group, JudgeTask, LightRollout, Sampling, Score, ScoreStatus, StopReason, Task, Tokens
from tests.mini_joint_recipe import LetterVerdicts, SaysAnswer, pair
from tests.test_posttrain_resume import kill_at, metrics_of, rollouts_of
from tests.tiny_models import ScriptedEngine, tiny_chat

RECIPE = str(Path(__file__).parent / "mini_joint_recipe.py")


def prompt(name: str, label: str) -> JudgeTask:
    task = Task(id=name, domain="judge", prompt=(), answer=label, info={"source": "verified"})
    return JudgeTask(variants=(task,), label=label, labels=("met", "unmet"), source="verified")


def played(tasks: Sequence[Task], values: Sequence[float | None], text: str = "x") -> Group:
    rollouts = tuple(
        LightRollout(
            id=f"r/{i}",
            task=task,
            messages=({"role": "assistant", "content": text},),
            num_turns=1,
            stop=StopReason.FINISHED,
            tokens=Tokens(num_tokens=3 + i, num_loss_tokens=1 + i, version_range=(0, 0), source=None),
        )
        for i, (task, _) in enumerate(zip(itertools.cycle(tasks), values, strict=False))
    )
    status = {True: ScoreStatus.OK, False: ScoreStatus.PARSE_ERROR}
    scores = tuple(Score(value=value, status=status[value is not None], error="why") for value in values)
    return Group(task=tasks[0], rollouts=rollouts, scores=scores)


@pytest.fixture
def session(tiny_model: str, tmp_path: Path) -> Session:
    run = RunDir(tmp_path / "run")
    recipe = load_recipe(RECIPE, [f"model.path={tiny_model}"])
    return Session(recipe=recipe, run=run, metrics=MetricsLog(run), progress=Progress())


def judging_of(session: Session, saved: dict | None = None) -> Judging:
    return Judging(session, session.run.stage("grpo-vowels"), "vowels", saved)


def test_answers_are_drawn_equally_often_however_rare_one_is():
    pool = JudgePool(size=500)
    pool.add([prompt(f"m{i}", "met") for i in range(300)] + [prompt(f"u{i}", "unmet") for i in range(20)])
    drawn = [pool.draw(random.Random(i), (), anchor_share=0.5, max_lead=1) for i in range(40)]
    assert Counter(task.label for task in drawn if task) == {"met": 20, "unmet": 20}
    assert len({task.id for task in drawn if task}) == 40, "no prompt is used twice"


def test_an_answer_that_runs_out_leaves_places_empty_and_never_teaches_the_base_rate():
    pool = JudgePool(size=500)
    pool.add([prompt(f"m{i}", "met") for i in range(300)] + [prompt("u", "unmet")])
    drawn = [pool.draw(random.Random(i), (), anchor_share=0.0, max_lead=2) for i in range(20)]
    found = Counter(task.label for task in drawn if task)
    assert found == {"met": 3, "unmet": 1}
    assert drawn.count(None) == 16
    golden = [prompt("g", "unmet")]
    assert pool.draw(random.Random(0), golden, anchor_share=0.0, max_lead=2) is golden[0]


def test_a_pool_keeps_the_newest_and_each_prompt_once():
    pool = JudgePool(size=3)
    pool.add([prompt(f"m{i}", "met") for i in (0, 1, 2, 3, 3)])
    left = {task.id for i in range(9) if (task := pool.draw(random.Random(i), (), anchor_share=0, max_lead=9))}
    assert left == {"m1", "m2", "m3"}


def test_a_pool_draws_the_same_after_a_way_through_a_checkpoint():
    pool, again = JudgePool(size=50), JudgePool(size=50)
    pool.add([prompt(f"{label}{i}", label) for i in range(30) for label in ("met", "unmet")])
    for i in range(7):
        pool.draw(random.Random(i), (), anchor_share=0, max_lead=3)
    again.restore(json.loads(json.dumps(pool.state())))
    draws = [[p.draw(random.Random(i), (), anchor_share=0, max_lead=3) for i in range(20)] for p in (pool, again)]
    assert draws[0] == draws[1]


def test_both_orders_are_credited_together():
    orders = pair("p").variants
    group = credit_both_orders(played(orders, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, None, 1.0]))
    assert [score.value for score in group.scores] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, None, None]
    assert group.scores[7].status is ScoreStatus.PARSE_ERROR
    assert "other order" in str(group.scores[7].error)
    alone = played(orders[:1], [1.0, 0.0])
    assert credit_both_orders(alone) is alone


@pytest.mark.parametrize(
    ("values", "informative"),
    [([1.0, 1.0, None], False), ([0.0, 0.0], False), ([1.0, 0.0], True), ([None, None], False)],
)
def test_a_group_teaches_only_where_replies_differ(values, informative):
    assert is_informative(played(pair("p").variants[:1], values)) is informative


def test_variants_are_played_in_turn_and_a_place_nobody_takes_is_an_empty_group():
    engine = ScriptedEngine(lambda request: "a")
    player = Player(engine=engine, judge_engine=None, chat=tiny_chat(), substrate=None, workers=Workers())
    play = Play(environment=SingleTurn(), reward=SaysAnswer(), sampling=Sampling(max_tokens=4), max_sequence_tokens=99)
    task = pair("p")
    job = GroupJob(id="s/0/judge-0", task=task.variants[0], num_rollouts=4, play=play, seed=0, variants=task.variants)
    whole, empty = asyncio.run(player.play([job, replace(job, id="s/0/judge-1", num_rollouts=0)]))
    assert [rollout.task.id for rollout in whole.rollouts] == ["p-xy", "p-yx"] * 2
    assert [score.value for score in whole.scores] == [1.0, 0.0] * 2
    assert len({request.prompt_ids.tobytes() for request in engine.requests}) == 2
    assert (empty.rollouts, empty.scores) == ((), ())


@dataclass
class Rollouts:
    """A rollout service that only takes note of what it is given."""

    submitted: list[GroupJob] = field(default_factory=list)

    def submit(self, jobs: Sequence[GroupJob]) -> None:
        self.submitted += jobs


def submitted(session: Session, judging: Judging | None, position: Position, steps: int) -> list[GroupJob]:
    service = Rollouts()
    session.rollouts = service
    training = Training.specialist(session.recipe, "vowels")
    stream = open_stream(session, session.run.stage("grpo-vowels"), training, position, judging)
    stream._fill(steps)
    return service.submitted


def test_generate_prompts_are_the_same_with_judge_prompts_and_without(session):
    with_judge = submitted(session, judging_of(session), Position(step=0), steps=3)
    alone = submitted(session, None, Position(step=0), steps=3)
    generate = [job for job in with_judge if job.task.domain == "vowels"]
    assert [(j.id, j.task.id, j.num_rollouts) for j in generate] == [(j.id, j.task.id, j.num_rollouts) for j in alone]
    judge = [job for job in with_judge if job.task.domain == "vowels-judge"]
    assert [job.id for job in judge] == [f"grpo-vowels/{step}/judge-{i}" for step in range(3) for i in range(2)]


def test_a_resumed_stage_asks_the_judge_prompts_that_were_under_way(session):
    before = judging_of(session)
    first = submitted(session, before, Position(step=0), steps=2)
    saved = json.loads(json.dumps(before.state([2, 3, 6, 7])))
    after = judging_of(session, saved)
    again = submitted(session, after, Position(step=1, pending=(2, 3, 6, 7), kept=saved), steps=1)
    wanted = [(job.id, job.task, job.variants) for job in first if job.id.partition("/")[2] in UNDER_WAY]
    assert [(job.id, job.task, job.variants) for job in again] == wanted


@dataclass(frozen=True, slots=True)
class OnlyVerified(LetterVerdicts):
    """Has no prompts before something was generated."""

    def anchors(self) -> Sequence[JudgeTask]:
        return []


def test_a_place_that_found_no_prompt_stays_empty_when_its_stage_is_resumed(session):
    domain = session.recipe.domains["vowels"]
    domain = domain.replace(judge_training=domain.judge_training.replace(tasks=OnlyVerified()))
    session.recipe = session.recipe.replace(domains={"vowels": domain})
    before = judging_of(session)
    submitted(session, before, Position(step=0), steps=2)
    before._pool.add([prompt(f"{label}{i}", label) for i in range(4) for label in ("met", "unmet")])
    saved = json.loads(json.dumps(before.state([6, 7])))
    after = judging_of(session, saved)
    again = submitted(session, after, Position(step=1, pending=(6, 7), kept=saved), steps=1)
    assert [job.num_rollouts for job in again if job.task.domain == "vowels-judge"] == [0, 0]
    assert after._empty == before._empty == 4
    assert after._pool.state() == before._pool.state()


UNDER_WAY = {"0/judge-0", "0/judge-1", "1/judge-0", "1/judge-1"}


@dataclass
class Aside:
    """Plays the jobs given aside with replies that are right as told."""

    values: Sequence[float | None]
    jobs: list[GroupJob] = field(default_factory=list)

    def play_aside(self, jobs: Sequence[GroupJob]) -> dict[str, Group]:
        self.jobs += jobs
        return {job.id: played(job.variants, self.values) for job in jobs}


def test_prompts_that_teach_nothing_are_dropped_counted_and_replaced(session):
    judging = judging_of(session)
    asked = [job for job in submitted(session, judging, Position(step=0), steps=1) if job.variants]
    vowels = next(iter(session.recipe.domains["vowels"].tasks.train(seed=0)))
    groups = [
        played([vowels], [1.0, 1.0, 0.0], text="a"),
        played(asked[0].variants, [1.0] * 4),
        played(asked[1].variants, [0.0] * 4),
    ]
    stream = Aside([1.0, 1.0, 0.0, 0.0])
    generated, judged = judging.settle(groups, 0, stream)
    assert generated == groups[:1]
    assert [job.id for job in stream.jobs] == ["grpo-vowels/0/refill-0-0", "grpo-vowels/0/refill-0-1"]
    assert len(judged.groups) == 4
    learned = [not np.isnan(row).any() for row in judged.advantages]
    assert learned == [False, False, True, True]
    assert [judged.metrics[f"judge/{name}"] for name in ("groups", "too_easy", "all_wrong", "refilled")] == [4, 1, 1, 2]
    assert judged.metrics["judge/pool_a"] == 1, "the text that said a became a judge prompt"
    assert judged.metrics["length_correlation"] == pytest.approx(-0.866, abs=1e-3), "the longest text earned nothing"


def test_the_weight_multiplies_the_advantages_of_judge_replies(session):
    vowels = session.recipe.domains["vowels"]
    heavy = vowels.replace(judge_training=vowels.judge_training.replace(weight=3.0, max_refills=0))
    session.recipe = session.recipe.replace(domains={"vowels": heavy})
    _, judged = judging_of(session).settle([judge_group([1.0, 0.0])], 0, Aside([]))
    assert judged.advantages == [[1.5, -1.5]]


def judge_group(values: Sequence[float]) -> Group:
    [task, *_] = LetterVerdicts().anchors()
    return played([replace(task.variants[0], domain="vowels-judge")], values)


@dataclass(frozen=True)
class Biased:
    """A monitor of one prompt that finds the bias it is told."""

    bias: float
    samples: int = 2
    temperature: float = 1.0

    def tasks(self) -> Sequence[JudgeTask]:
        return [pair("p")]

    def scores(self, groups: Sequence[Group]) -> dict[str, float]:
        return {}

    def measure(self, groups: Sequence[Group], start: Mapping[str, float]) -> dict[str, float]:
        return {"bias": self.bias}


@pytest.mark.parametrize(("bias", "warnings"), [(0.3, 1), (0.05, 0), (-0.3, 0), (float("nan"), 0)])
def test_a_judge_that_became_lenient_is_in_the_report_once(session, bias, warnings):
    vowels = session.recipe.domains["vowels"]
    watched = vowels.replace(judge_training=vowels.judge_training.replace(monitor=Biased(bias)))
    session.recipe = session.recipe.replace(domains={"vowels": watched})
    judging, stream = judging_of(session), Aside([1.0] * 4)
    assert judging.measure(1, stream) == {}, "only every second step"
    for step in (2, 4):
        assert list(judging.measure(step, stream)) == ["judge/frozen/bias"]
    assert {job.id for job in stream.jobs} == {"grpo-vowels/monitor/0"}, "the same random numbers at every step"
    assert [job.player for job in stream.jobs] == ["step-000002", "step-000004"]
    assert stream.jobs[0].num_rollouts == 4, "two samples in each of two orders"
    told = [event["message"] for event in session.run.read_events() if event["kind"] == "warning"]
    assert len(told) == warnings
    assert all("0.300 above the truth" in message for message in told)


def test_replies_must_share_out_evenly_over_the_orders(session):
    vowels = session.recipe.domains["vowels"]
    odd = vowels.replace(judge_training=vowels.judge_training.replace(num_generations=3))
    session.recipe = session.recipe.replace(domains={"vowels": odd})
    with pytest.raises(RecipeError, match=r"num_generations = 3.* 2 presentation orders"):
        judging_of(session)


def test_a_judge_prompt_longer_than_the_window_is_found_before_the_run(tiny_model):
    recipe = load_recipe(RECIPE, [f"model.path={tiny_model}"])
    check_recipe(recipe)
    vowels = recipe.domains["vowels"]
    longer = LetterVerdicts(anchors_of=("x" * 80,))
    for broken, problem in (
        ({"tasks": longer}, "prompt of task 'judge-xxx.* which leaves no room to answer"),
        ({"num_generations": 3}, "judge_training.num_generations = 3: judge prompt 'p-xy' has 2 presentation orders"),
    ):
        changed = vowels.replace(judge_training=vowels.judge_training.replace(**broken))
        with pytest.raises(RecipeError, match=problem):
            check_recipe(recipe.replace(domains={"vowels": changed}))


def test_judge_prompts_need_a_stage_to_join():
    vowels = load_recipe(RECIPE, []).domains["vowels"]
    with pytest.raises(ValueError, match="judge_training is set without grpo"):
        vowels.replace(grpo=None)


def test_a_judge_prompt_comes_back_whole_from_json():
    import dataclasses

    for task in (pair("p"), *LetterVerdicts().anchors()):
        assert judge_task(json.loads(json.dumps(dataclasses.asdict(task)))) == task


def start(tiny_model: str, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "posttrain.cli", "run", RECIPE, "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [*command, "--set", f"model.path={tiny_model}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_joint_run_killed_amid_judging_ends_as_if_it_was_never_disturbed(tiny_model, tmp_path):
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(tiny_model, undisturbed))
    stage = Path("stages", "grpo-vowels")
    kill_at(start(tiny_model, run_dir), run_dir / stage, "checkpoints/step-00000[2-5]")
    finish(start(tiny_model, run_dir, "--resume"))

    report = json.loads((run_dir / "report.json").read_text())
    assert [event["step"] >= 2 for event in report["resumed"]] == [True]
    assert metrics_of(run_dir) == metrics_of(undisturbed)
    assert rollouts_of(run_dir / stage) == rollouts_of(undisturbed / stage)
    weights = stage / "final" / "model.safetensors"
    assert (run_dir / weights).read_bytes() == (undisturbed / weights).read_bytes()

    steps = [line for line in metrics_of(undisturbed) if line["stage"] == "grpo-vowels"]
    assert [line["step"] for line in steps] == list(range(7))
    assert [line["step"] for line in steps if "judge/frozen/shift" in line] == [0, 2, 4, 6]
    judged = [line for line in rollouts_of(undisturbed / stage) if line["domain"] == "vowels-judge"]
    assert any(line["advantage"] for line in judged), "some judge replies were learned from"
    assert {line["domain"] for line in rollouts_of(undisturbed / stage)} == {"vowels", "vowels-judge"}


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_joint_run_ahead_of_its_learner_trains_on_every_group_once_over_a_kill(tiny_model, tmp_path):
    ahead = ("--set", "domains.*.grpo.max_staleness=1", "--set", "domains.*.grpo.max_refills=0")
    run_dir = tmp_path / "run"
    stage = run_dir / "stages" / "grpo-vowels"
    kill_at(start(tiny_model, run_dir, *ahead), stage, "checkpoints/step-00000[2-5]")
    saved = json.loads(max(stage.glob("checkpoints/step-*/checkpoint.json")).read_text())["caller"]
    assert len(saved["pending"]) == 4, "the four groups of another step are under way while one is learned"
    judge_places = {number for number in saved["pending"] if number % 4 >= 2}
    assert {int(number) for number in saved["kept"]["drawn"]} <= judge_places
    finish(start(tiny_model, run_dir, *ahead, "--resume"))
    rollouts = rollouts_of(stage)
    assert len(rollouts) == len({rollout["id"] for rollout in rollouts})
    generated = {rollout["id"].rpartition("/")[0] for rollout in rollouts if rollout["domain"] == "vowels"}
    assert generated == {f"grpo-vowels/{step}/{index}" for step in range(6) for index in range(2)}
    lines = [line for line in metrics_of(run_dir) if line["stage"] == "grpo-vowels" and line["step"]]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert max(line["max_staleness"] for line in lines) <= 1 + 1, "one that is overtaken gets older"
