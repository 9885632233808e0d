"""From scores and logs to the report: numbers, words, pictures, page."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from posttrain.runs.durable import iter_jsonl, read_json
from posttrain.runs.evaluation import DomainEvaluation, ModelScores, load_evaluations, scores_path, summarise
from posttrain.runs.examples import pick_examples
from posttrain.runs.metrics import MetricsLog, read_metrics
from posttrain.runs.plots import CURVES, draw_curve, draw_scores, lines_of
from posttrain.runs.progress import Progress, duration, print_report
from posttrain.runs.report import write_report
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import EventKind, RunDir
from posttrain.runs.stats import Bootstrap
from posttrain.runs.verdict import gain_verdict, headline, kept_verdict
from posttrain.types import (
    Completion,
    FinishReason,
    Group,
    Judgment,
    Rollout,
    Score,
    ScoreStatus,
    StopReason,
    Task,
    Turn,
)

FIELDS = {"n", "base", "sft", "specialist", "student", "gain_ci", "rl_gain_ci", "kept", "kept_ci", "unscored"}
FIELDS |= {"student_gain_ci"}
NASTY = "</pre><script>alert('x')</script> & more"


def scores(model, sampled, domain="math"):
    sampled = np.array(sampled, float)
    ids = tuple(f"{domain}-{i}" for i in range(len(sampled)))
    return ModelScores(model=model, domain=domain, task_ids=ids, greedy=sampled[:, :1], sampled=sampled)


def full_evaluation(domain="math", n=40):
    rng = np.random.default_rng(len(domain))
    chances = {"base": 0.1, "sft": 0.3, "specialist": 0.8, "student": 0.78}
    return DomainEvaluation.of([scores(m, rng.random((n, 4)) < p, domain) for m, p in chances.items()])


def group(domain="math", task="t1", values=(1.0, 0.0), text="I say 4."):
    task = Task(id=task, domain=domain, prompt=({"role": "user", "content": "2 + 2?"},), answer="4")
    completion = Completion(
        request_id="r",
        token_ids=np.arange(3, dtype=np.int32),
        logprobs=np.zeros(3, np.float32),
        versions=np.array([4, 4, 5], np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.arange(5, dtype=np.int32), completion=completion, text=text)
    rollouts = tuple(
        Rollout(id=f"{task.id}-{i}", task=task, turns=(turn,), stop=StopReason.FINISHED) for i in range(len(values))
    )
    judged = (Judgment(criterion="clear", verdict="met", score=1.0, evidence="says 4"),)
    made = tuple(
        Score(
            value=value,
            parts={"exact": value},
            explanation="compared with 4",
            judgments=judged,
            status=ScoreStatus.OK if value is not None else ScoreStatus.SANDBOX_ERROR,
        )
        for value in values
    )
    return Group(task=task, rollouts=rollouts, scores=made)


def test_scores_survive_the_file(tmp_path):
    written = scores("base", [[1.0, math.nan], [0.5, 0.0]])
    path = written.save(tmp_path)
    assert path == scores_path(tmp_path, "base", "math")
    read = ModelScores.load(path)
    assert (read.model, read.domain, read.task_ids) == ("base", "math", ("math-0", "math-1"))
    np.testing.assert_array_equal(read.sampled, written.sampled)
    np.testing.assert_array_equal(read.greedy, written.greedy)


def test_evaluations_are_loaded_by_domain(tmp_path):
    for domain in ("math", "code-agent"):
        for model in full_evaluation(domain).models.values():
            model.save(tmp_path)
    assert [(e.domain, list(e.models)) for e in load_evaluations(tmp_path)] == [
        ("code-agent", ["base", "sft", "specialist", "student"]),
        ("math", ["base", "sft", "specialist", "student"]),
    ]


def test_models_must_share_their_tasks():
    with pytest.raises(ValueError, match=r"student on 'math' was evaluated on other tasks than base"):
        DomainEvaluation.of([scores("base", [[1.0]]), scores("student", [[1.0], [0.0]])])


def test_scores_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"greedy scores of base on 'math' have shape \(2, 1\)"):
        ModelScores(model="base", domain="math", task_ids=("a",), greedy=np.zeros((2, 1)), sampled=np.zeros((1, 4)))


def test_summary_by_hand():
    evaluation = DomainEvaluation.of(
        [
            scores("base", [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
            scores("specialist", [[1.0, 1.0], [1.0, 1.0], [1.0, math.nan]]),
            scores("student", [[1.0, 0.0], [0.5, 0.5], [math.nan, math.nan]]),
        ]
    )
    entry = summarise(evaluation, Bootstrap())
    assert set(entry) == FIELDS | {"domain", "greedy", "efforts"}
    assert set(entry["greedy"]) == FIELDS
    # The third task has no student score, so every mean is over the first two.
    assert (entry["n"], entry["base"], entry["specialist"], entry["student"]) == (2, 0.0, 1.0, 0.5)
    assert (entry["gain_ci"], entry["kept"], entry["kept_ci"]) == ([1.0, 1.0], 0.5, [0.5, 0.5])
    assert (entry["sft"], entry["rl_gain_ci"]) == (None, None)
    assert entry["unscored"] == {"base": 0, "specialist": 1, "student": 2}
    assert entry["greedy"]["kept"] == 0.75


def test_a_run_without_specialist_or_student_has_nulls():
    entry = summarise(DomainEvaluation.of([scores("base", [[1.0], [0.0]])]), Bootstrap())
    assert entry["base"] == 0.5
    assert [entry[name] for name in ("specialist", "student", "gain_ci", "kept", "kept_ci")] == [None] * 5
    assert kept_verdict(entry).words == "no student"


def test_nothing_scored_gives_nulls_not_nan():
    entry = summarise(DomainEvaluation.of([scores("base", [[math.nan]]), scores("specialist", [[1.0]])]), Bootstrap())
    assert (entry["n"], entry["base"], entry["gain_ci"]) == (0, None, None)


@pytest.mark.parametrize(
    ("interval", "words"),
    [([0.1, 0.2], "better"), ([-0.2, -0.1], "worse"), ([-0.1, 0.1], "not shown"), (None, "not measured")],
)
def test_gain_in_words(interval, words):
    assert gain_verdict(interval).words == words


@pytest.mark.parametrize(
    ("kept", "interval", "tone", "words"),
    [
        (0.97, [0.8, 1.1], "good", "kept"),
        (0.97, [None, None], "unclear", "kept, uncertain"),
        (0.97, [0.79, 1.1], "unclear", "kept, uncertain"),
        (0.8, [0.6, 1.0], "unclear", "partly kept, uncertain"),
        (0.7, [0.6, 0.8], "bad", "partly kept"),
        (0.2, [0.0, 0.4], "bad", "mostly lost"),
        (-0.2, [-0.4, 0.1], "bad", "lost"),
        (None, None, "none", "no gain to keep"),
    ],
)
def test_kept_in_words(kept, interval, tone, words):
    verdict = kept_verdict({"student": 0.5, "kept": kept, "kept_ci": interval})
    assert (verdict.tone, verdict.words) == (tone, words)


def test_headline_names_the_exceptions():
    up, down = {"student_gain_ci": [0.1, 0.2]}, {"student_gain_ci": [-0.4, -0.1]}
    good = {"domain": "math", "gain_ci": [0.1, 0.2], "student": 0.5, "kept": 0.96, "kept_ci": [0.9, 1.0], **up}
    flat = {"domain": "code", "gain_ci": [-0.1, 0.2], "student": 0.5, "kept": 0.1, "kept_ci": [0.0, 0.3], **up}
    gone = {"domain": "agent", "gain_ci": [-0.2, 0.1], "student": 0.4, "kept": None, "kept_ci": None, **down}
    assert headline([good]) == "The math specialist beats the base model. The student kept their gains: 96% in math."
    assert "the exceptions: code (not shown)" in headline([good, flat])
    assert "lost part of the gain in code" in headline([good, flat])
    assert headline([good, gone]).endswith("The student is worse than the base model in agent.")


def test_rollout_records_explain_the_reward(tmp_path):
    stage = RunDir(tmp_path).stage("grpo-math")
    log = RolloutLog(stage)
    log.write_groups([group(values=(1.0, None))], 3, advantages=[[0.5, math.nan]])
    log.write_groups([group()], 4, model="student")
    first, second, third, _ = iter_jsonl(stage.rollouts)
    assert first["conversation"] == [{"role": "assistant", "content": "I say 4."}]
    assert (first["step"], first["task"], first["domain"], first["stop"]) == (3, "t1", "math", "finished")
    assert (first["score"], first["parts"], first["explanation"]) == (1.0, {"exact": 1.0}, "compared with 4")
    assert first["judgments"][0]["evidence"] == "says 4"
    assert (first["tokens"], first["versions"]) == ({"generated": 3, "total": 8}, [4, 5])
    assert first["advantage"] == 0.5
    assert (second["score"], second["status"], second["advantage"]) == (None, "sandbox_error", None)
    assert third["model"] == "student"
    assert log.rewind(3) == 2
    assert [record["step"] for record in iter_jsonl(stage.rollouts)] == [3, 3]


def test_advantages_of_the_wrong_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        RolloutLog(RunDir(tmp_path).stage("grpo-math")).write_groups([group()], 1, advantages=[[0.5]])


def test_examples_come_from_the_evaluation_when_it_has_some(tmp_path):
    run = RunDir(tmp_path)
    for number in range(9):
        RolloutLog(run.stage("grpo-math")).write_groups([group(task=f"train-{number}")], number)
    only_training = pick_examples(run)["math"]
    assert [(record["score"], record["stage"]) for record in only_training.good] == [(1.0, "grpo-math")] * 3
    assert [record["score"] for record in only_training.bad] == [0.0] * 3
    assert len({record["task"] for record in only_training.good}) == 3
    RolloutLog(run.stage("evaluate")).write_groups([group(task="held", values=(0.0, 0.0, None))], 0, model="student")
    picked = pick_examples(run)["math"]
    assert (picked.good, [r["task"] for r in picked.bad], len(picked.unscored)) == ([], ["held"], 1)


def test_curves_find_their_domains():
    nan = math.nan
    metrics = [
        {"stage": "grpo-a-b", "step": 1, "time": 0.0, "reward": 0.5, "reward/exact": 0.1},
        {"stage": "grpo-a-b", "step": 2, "time": 0.0, "reward": nan},
        {"stage": "distill", "step": 1, "time": 0.0, "kl": 9.0, "kl/math": 0.7},
    ]
    curves = {curve.name: lines_of(curve, metrics) for curve in CURVES}
    assert curves["grpo_reward"] == {"a-b": ([1], [0.5])}
    assert curves["distill_kl"] == {"math": ([1], [0.7])}
    assert curves["sft_loss"] == {}


def test_pictures_show_the_numbers():
    axes = draw_scores([full_evaluation()], Bootstrap()).axes[0]
    heights = [bar.get_height() for bar in axes.patches if bar.get_height()]
    entry = summarise(full_evaluation(), Bootstrap())
    assert heights == pytest.approx([entry[name] for name in ("base", "sft", "specialist", "student")])
    curve = draw_curve(CURVES[0], {"math": ([1, 2, 3], [0.1, 0.2, 0.3])}).axes[0]
    np.testing.assert_allclose(curve.lines[0].get_ydata(), [0.1, 0.2, 0.3])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("report") / "run")
    run.write_recipe({"name": "laptop-merge", "note": NASTY})
    run.log_event(EventKind.STARTED, name="laptop-merge")
    run.log_event(EventKind.STAGE_STARTED, stage="grpo-math")
    with MetricsLog(run) as log:
        for step in range(1, 30):
            log.log("grpo-math", step, {"reward": step / 30, "entropy": 1.0})
    run.log_event(EventKind.RESUMED, stage="grpo-math", step=12)
    run.log_event(EventKind.WARNING, message=NASTY)
    RolloutLog(run.stage("grpo-math")).write_groups([group(text=NASTY, task=NASTY)], 29)
    evaluations = [full_evaluation(), full_evaluation("code")]
    write_report(run, evaluations, read_metrics(run.metrics), {"bytes_per_token": 512, "x": {"y": NASTY}}, Bootstrap())
    return run


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ids, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.ids += [values["id"]] if "id" in values else []


def test_the_page_is_self_contained_and_escaped(run):
    text = run.report_html.read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert text.count("&lt;script&gt;alert(") >= 4  # task, conversation, warning, cost
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 3
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert "All 2 specialists beat the base model." in text
    assert "went on after step 12" in text
    assert "$" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_report_json_and_pictures(run):
    report = read_json(run.report_json)
    assert set(report) == {"recipe", "created", "resumed", "domains", "costs", "stages"}
    assert report["recipe"] == "laptop-merge"
    assert [(item["stage"], item["step"]) for item in report["resumed"]] == [("grpo-math", 12)]
    assert [entry["domain"] for entry in report["domains"]] == ["math", "code"]
    names = sorted(path.name for path in run.plots.iterdir())
    assert names == ["grpo_entropy.png", "grpo_reward.png", "scores.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.plots.iterdir())


def test_a_run_that_has_nothing_yet_gets_a_report(tmp_path):
    page = write_report(RunDir(tmp_path), [], [], {}, Bootstrap())
    assert "No specialist was compared with the base model." in page.read_text()


def test_the_table_fits_80_columns(run):
    out = io.StringIO()
    print_report(read_json(run.report_json), Console(file=out, width=80))
    text = out.getvalue()
    assert "\u2026" not in text
    assert re.search(r"\+0\.\d\d\.\.\+0\.\d\d", text)
    for word in ("specialist", "RL gain", "better", "kept", "All 2 specialists"):
        assert word in text


def test_progress_without_a_terminal_prints_lines():
    out = io.StringIO()
    with Progress(Console(file=out, width=60), interval_s=1000) as progress:
        stage = progress.stage("grpo-math", 50, first_step=10)
        for step in range(11, 51):
            stage.update(step, {"reward": step / 50, "tokens_per_s": 1234.0, "other": 1.0})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("grpo-math: step 11/50 reward 0.22 tok/s 1,234 ETA ")
    assert lines[1] == "grpo-math: step 50/50 reward 1 tok/s 1,234"


def test_progress_on_a_terminal_shows_a_bar():
    out = io.StringIO()
    with Progress(Console(file=out, width=120, force_terminal=True)) as progress:
        progress.stage("distill", 4).update(4, {"kl": 0.25, "loss": 0.5})
    assert "distill" in out.getvalue()
    assert "4/4" in out.getvalue()
    assert "KL 0.25 loss 0.5" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
