"""Tool-call errors of one model that learns to call in DSML and, from the same start, in JSON.

    python -m benchmarks.tool_call_formats [--quick] [--json FILE] [--plot FILE] [--seeds 0,1,2] [--model PATH]

Prompts hold a text that is hard to quote, and the call has to pass it on as it is. Both models have the same start,
dialogue (V4's, without reasoning), demonstrations, steps, rate and random numbers; they differ in how the call of a
demonstration is written: in V4's DSML, or as this repository's fenced JSON block. Then they answer the same held-out
prompts with the same random numbers, once sampled and once greedily. Intervals are 95 % bootstraps over prompts.

The start, one for all forms and seeds, is the base after ``--copy-steps`` of repeating such prompts word for word: then
it knows V4's turns and copies, and the errors of a model that cannot copy say nothing about formats. The base is
SmolLM2-135M-Instruct. ``--quick`` takes the tiny base, which does not learn to copy in its steps: nearly every call is
wrong in both forms, which shows that everything runs and compares nothing.

A text that holds the end tag of a DSML parameter has no form in DSML. None is demonstrated; such prompts are played
besides and counted apart.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import json
import random
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import Metric, arguments, report
from posttrain.config import SFT, Model, Optim
from posttrain.conversation.dsml import PARAMETER_END, call_row
from posttrain.conversation.dsml_parser import MalformedTurn, parse_shown
from posttrain.conversation.effort import NON_THINK
from posttrain.conversation.tool_calls import format_tool_call
from posttrain.conversation.v4 import V4Format
from posttrain.conversation.v4_tokens import DSML
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.learner.sft import run_sft
from posttrain.models import base_path, compute_dtype, load_model, load_tokenizer
from posttrain.protocols import Demonstration
from posttrain.runs.stats import Bootstrap, Estimate, Scores, bootstrap_gain, bootstrap_mean
from posttrain.types import FinishReason, Message, Request, Sampling, Task, ToolCall
from recipes.quickstart import BASE as TINY
from recipes.smollm2 import BASE as SMOLLM2
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id, training
from recipes.tasks.words import WORDS
from rewards.tool_calls import read_fenced


class Kind(StrEnum):
    """What became of a call."""

    RIGHT = "right"
    REPAIRED = "repaired"
    """Only the tolerant parser reads it, and then it is right."""
    QUOTING = "quoting"
    """It is read, and its arguments differ from those wanted in escapes or types only."""
    PUNCTUATION = "punctuation"
    """It is read, with the right letters and digits, and some other characters are missing or too many."""
    CONTENT = "content"
    """It is read and says something else."""
    UNREADABLE = "unreadable"


ERRORS = tuple(kind for kind in Kind if kind is not Kind.RIGHT)
FORM_ERRORS = (Kind.REPAIRED, Kind.QUOTING, Kind.UNREADABLE)
"""Those that are a matter of how a call is written."""
PER_1000 = "per 1,000 calls"
TEMPERATURES: Mapping[str, float] = {"sampled": 1.0, "greedy": 0.0}
COPY_SEED = 1000
log = Console(stderr=True)


def code(rng: random.Random) -> str:
    a, b, c = _names(rng, 3)
    lines = (
        f'{a} = "{b}\\n"',
        f"{a}('{b}', \"{c}\")",
        f'if {a} == "{b}":\n    {c}()',
        f"{a}['{b}'] = f\"{{{c}}}\"",
        f'"""{a} \'{b}\'"""',
        f"{a} = r'\\{b}' # \"{c}\"",
    )
    return "\n".join(rng.sample(lines, 2))


def shell(rng: random.Random) -> str:
    a, b, c = _names(rng, 3)
    parts = (
        f'echo "${a}"',
        f"grep '{a}\\.{b}' \"{c}\"",
        f"printf '%s\\n' \"{a} '{b}'\"",
        f'{a} "\\"{b}\\"" > {c}',
        f"sed 's/\\\\{a}/{b}/' <<< \"${c}\"",
    )
    return rng.choice((" | ", " && ", "\n")).join(rng.sample(parts, 2))


def json_text(rng: random.Random) -> str:
    a, b, c, d = _names(rng, 4)
    values = (b, f'{b} "{c}"', f"{b}\\{c}", f"{b}\n{c}", [b, f"'{c}'"], {b: f'"{c}"'})
    return json.dumps({a: rng.choice(values), d: rng.choice(values)}, indent=rng.choice((None, None, 1)))


def pattern(rng: random.Random) -> str:
    atoms = ("\\s+", "\\\\", "\\b{}", '"{}"', "[^\"']*", "({}|{})", "\\.", "(?P<{}>\\d+)", "'?", "\\n", "{}$")
    return "".join(atom.format(*_names(rng, 2)) for atom in rng.sample(atoms, 4))


def markup(rng: random.Random) -> str:
    a, b, c = _names(rng, 3)
    parts = (
        f'<{a} {b}="{c}">',
        f"</{a}>",
        f"<{a} {b}='\"{c}\"'/>",
        f"&lt;{a}&gt;",
        f'<!-- {a} "{b}" -->\n',
        f"{a}'s",
    )
    return "".join(rng.sample(parts, 3))


def tags(rng: random.Random) -> str:
    """What the two forms are made of, without the one tag that DSML cannot hold."""
    a, b = _names(rng, 2)
    parts = (
        f'<{DSML}invoke name="{a}">\n',
        f"</{DSML}invoke>\n",
        f'<{DSML}parameter name="{a}" string="true">',
        "</parameter>\n",
        f"</{DSML}tool_calls>",
        f'```tool\n{{"name": "{a}"',
        "\n```\n",
        '"}}\n',
        '\\"}',
    )
    return b.join(rng.sample(parts, 2))


def end_tag(rng: random.Random) -> str:
    a, b = _names(rng, 2)
    return f"{a}<{PARAMETER_END}>\n{b}"


def _names(rng: random.Random, count: int) -> list[str]:
    return [rng.choice((rng.choice(WORDS), rng.choice(string.ascii_lowercase))) for _ in range(count)]


Family = Callable[[random.Random], str]
FAMILIES: tuple[Family, ...] = (code, shell, json_text, pattern, markup, tags)


@dataclass(frozen=True)
class PassOn(DrawnTasks):
    """Prompts that name a tool and its arguments, the hard one on the lines after the first."""

    families: tuple[Family, ...] = FAMILIES

    def draw(self, rng: random.Random) -> SolvedTask:
        family = rng.choice(self.families)
        text, path, line = family(rng), f"{rng.choice(WORDS)}.txt", rng.randint(1, 99)
        if family is shell:
            call, asked = ToolCall("bash", {"command": text}), "bash"
        elif family is pattern:
            call, asked = ToolCall("search", {"pattern": text, "path": path}), f"search {path}"
        else:
            call, asked = ToolCall("insert", {"path": path, "line": line, "text": text}), f"insert {path} {line}"
        prompt: Message = {"role": "user", "content": f"{asked}\n{text}", "effort": NON_THINK}
        task = Task(
            id=problem_id("pass-on", prompt["content"]),
            domain="tools",
            prompt=(prompt,),
            info={"family": family.__name__, "call": call},
            effort=NON_THINK,
        )
        said: Message = {"role": "assistant", "content": "", "tool_calls": [call_row(call)]}
        return SolvedTask(task=task, solution=(said,))


@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written and read."""

    write: Callable[[ToolCall], Message]
    strict: Callable[[str, bool], Sequence[ToolCall]]
    """The calls of a turn, given whether it ended by itself. ``ValueError`` for what is not exactly in the form."""
    tolerant: Callable[[str, bool], Sequence[ToolCall]]
    """What rollouts use."""

    def answer(self, task: Task) -> Message:
        return self.write(task.info["call"])


def strict_json(text: str, ended: bool) -> Sequence[ToolCall]:
    """As ``read_fenced``, with no raw line breaks inside strings and nothing behind the block."""
    block = text.partition("```tool\n")[2]
    json.loads(block.removesuffix("\n```"))
    return read_fenced(text)


FORMS: Mapping[str, Form] = {
    "dsml": Form(
        write=lambda call: {"role": "assistant", "content": "", "tool_calls": [call_row(call)]},
        strict=lambda text, ended: parse_shown(text, ended=ended).calls,
        tolerant=lambda text, ended: parse_shown(text, ended=ended, strict=False).calls,
    ),
    "json": Form(
        write=lambda call: {"role": "assistant", "content": format_tool_call(call)},
        strict=strict_json,
        tolerant=lambda text, ended: read_fenced(text),
    ),
}


def classify(form: Form, text: str, wanted: ToolCall, *, ended: bool) -> Kind:
    """What became of the call in a turn."""
    for read in (form.strict, form.tolerant):
        try:
            calls = read(text, ended)
        except (ValueError, RecursionError):
            continue
        if calls:
            break
    else:
        return Kind.UNREADABLE
    if list(calls) == [wanted]:
        return Kind.RIGHT if read is form.strict else Kind.REPAIRED
    if len(calls) == 1:
        for kind, rest in ((Kind.QUOTING, _unescaped), (Kind.PUNCTUATION, _alphanumeric)):
            if _reduced(calls[0], rest) == _reduced(wanted, rest):
                return kind
    return Kind.CONTENT


def fault(form: Form, text: str, *, ended: bool) -> str:
    """Why a call is not exactly in its form, in a few words for counts; empty where it is."""
    if not ended:
        return "cut off"
    try:
        return "" if form.strict(text, ended) else "no call"
    except MalformedTurn as error:
        return error.rule
    except json.JSONDecodeError as error:
        return error.msg
    except (ValueError, RecursionError) as error:
        return str(error).partition(":")[0]


def _reduced(call: ToolCall, rest: Callable[[str], str]) -> Any:
    """A call without the types of its arguments, of whose text only ``rest`` is left."""
    arguments = call.arguments if isinstance(call.arguments, dict) else {}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in arguments.items()
    }
    return call.name, {name: rest(text) for name, text in texts.items()}


def _unescaped(text: str) -> str:
    spelled = str.maketrans({"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", "\\": None})
    return html.unescape(text).translate(spelled)


def _alphanumeric(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def num_escapes(task: Task) -> int:
    """Characters of a call's arguments that JSON has to escape."""
    texts = [value for value in task.info["call"].arguments.values() if isinstance(value, str)]
    return sum(json.dumps(character) != f'"{character}"' for text in texts for character in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is trained and played."""

    model: str
    copy_steps: int
    copy_learning_rate: float
    steps: int
    learning_rate: float
    batch_size: int
    prompts: int
    impossible: int
    """Prompts whose text holds DSML's end tag, besides."""
    max_tokens: int
    families: tuple[Family, ...] = FAMILIES

    def demonstrations(self, write: Callable[[Task], Message], steps: int, *, seed: int) -> list[Demonstration]:
        solved = islice(training(PassOn(self.families).draw, seed=seed), steps * self.batch_size)
        return [(*each.task.prompt, write(each.task)) for each in solved]

    def train(self, start: str, demonstrations: list[Demonstration], folder: Path, *, rate: float, seed: int) -> str:
        """A checkpoint that has seen each demonstration once."""
        steps = len(demonstrations) // self.batch_size
        final = run_sft(
            model_path=start,
            demonstrations=demonstrations,
            config=SFT(
                max_steps=steps,
                batch_size=self.batch_size,
                optim=Optim(learning_rate=rate, lr_scheduler_type="linear", warmup_steps=steps // 10),
            ),
            lora=None,
            seed=seed,
            output_dir=folder,
            on_log=lambda step, metrics: None,
            dtype=dtype_of(start),
        )
        shutil.rmtree(folder / "checkpoints")
        return str(final)


def dtype_of(model: str) -> torch.dtype:
    return compute_dtype("auto", load_model(model, torch.bfloat16).num_parameters())


def copier(plan: Plan, folder: Path) -> str:
    """Where both begin: the base in V4's dialogue, after it has repeated prompts."""
    base = base_path(Model(path=plan.model, chat="v4"))
    if plan.copy_steps == 0:
        return base
    # An assistant may spell no tag of DSML outside of calls.
    sayable = replace(plan, families=tuple(family for family in plan.families if family is not tags))
    demonstrations = sayable.demonstrations(
        lambda task: {"role": "assistant", "content": task.prompt[0]["content"]}, plan.copy_steps, seed=COPY_SEED
    )
    return plan.train(base, demonstrations, folder, rate=plan.copy_learning_rate, seed=COPY_SEED)


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    kind: Kind
    fault: str = ""
    """Where it is not exactly in its form, why."""


def play(model: str, form: Form, tasks: Sequence[Task], sampling: Sampling, *, seed: int) -> list[Reply]:
    chat = V4Format(load_tokenizer(model), effort=NON_THINK)
    engine = TransformersEngine(load_model(model, dtype_of(model)), stop_ids=chat.stop_ids)

    async def reply(task: Task) -> Reply:
        prompt_ids = chat.encode_prompt(task.prompt)
        done = await engine.generate(Request(id=task.id, prompt_ids=prompt_ids, sampling=sampling, seed=seed))
        text, ended = chat.decode(done.token_ids), done.finish is FinishReason.STOP
        return Reply(text, classify(form, text, task.info["call"], ended=ended), fault(form, text, ended=ended))

    async def all_replies() -> list[Reply]:
        return await asyncio.gather(*map(reply, tasks))

    try:
        return asyncio.run(all_replies())
    finally:
        engine.close()


@dataclass(frozen=True)
class Played:
    """What one form came to at one temperature."""

    tasks: Sequence[Task]
    replies: Sequence[Sequence[Reply]]
    """By seed, in the order of the tasks."""

    def per_1000(self, kinds: Collection[Kind], family: str | None = None) -> Scores:
        """1000 where a call is of one of these kinds, else 0, [prompts, seeds]; of all families but the impossible
        one, or of one."""
        chosen = [
            i
            for i, task in enumerate(self.tasks)
            if (task.info["family"] == family if family else task.info["family"] != end_tag.__name__)
        ]
        return np.array([[1000.0 * (replies[i].kind in kinds) for replies in self.replies] for i in chosen])

    def by_escapes(self) -> list[dict[str, float]]:
        """Errors per 1,000 calls of the prompts with fewest, more and most to escape, a third each."""
        chosen = [i for i, task in enumerate(self.tasks) if task.info["family"] != end_tag.__name__]
        counts = np.array([num_escapes(self.tasks[i]) for i in chosen])
        errors = self.per_1000(ERRORS).mean(axis=1)
        return [
            {
                "fewest": int(counts[third].min()),
                "most": int(counts[third].max()),
                "errors": float(errors[third].mean()),
            }
            for third in np.array_split(np.argsort(counts, kind="stable"), 3)
        ]

    def faults(self) -> dict[str, float]:
        """Calls per 1,000 that are not exactly in their form, by why, the impossible apart; most frequent first."""
        chosen = [i for i, task in enumerate(self.tasks) if task.info["family"] != end_tag.__name__]
        counts = Counter(replies[i].fault for replies in self.replies for i in chosen if replies[i].fault)
        return {why: 1000 * count / len(chosen) / len(self.replies) for why, count in counts.most_common()}

    def examples(self, kind: Kind, count: int = 3) -> list[dict[str, str]]:
        found = (
            {"prompt": task.prompt[0]["content"], "reply": reply.text}
            for task, reply in zip(self.tasks, self.replies[0], strict=True)
            if reply.kind is kind
        )
        return list(islice(found, count))


def compare(plan: Plan, seeds: Sequence[int], folder: Path) -> dict[str, dict[str, Played]]:
    """Train everything, and play it in every form and at every temperature."""
    start = copier(plan, folder / "copier")
    tasks = [*PassOn(plan.families).heldout(count=plan.prompts), *PassOn((end_tag,)).heldout(count=plan.impossible)]
    replies: dict[str, dict[str, list[list[Reply]]]] = {name: {label: [] for label in TEMPERATURES} for name in FORMS}
    for seed in seeds:
        for name, form in FORMS.items():
            trained = folder / f"{name}-{seed}"
            demonstrations = plan.demonstrations(form.answer, plan.steps, seed=seed)
            model = plan.train(start, demonstrations, trained, rate=plan.learning_rate, seed=seed)
            for label, temperature in TEMPERATURES.items():
                sampling = Sampling(temperature=temperature, max_tokens=plan.max_tokens)
                replies[name][label].append(play(model, form, tasks, sampling, seed=seed))
                kinds = Counter(str(reply.kind) for reply in replies[name][label][-1])
                log.print(f"seed {seed}, {name}, {label}: {dict(kinds)}", highlight=False)
            shutil.rmtree(trained)
    return {
        name: {label: Played(tasks, found) for label, found in by_label.items()} for name, by_label in replies.items()
    }


def tokens_per_call(plan: Plan) -> dict[str, float]:
    """Mean tokens of the right answer to a held-out prompt, by form."""
    chat = V4Format(load_tokenizer(base_path(Model(path=plan.model, chat="v4"))))
    tasks = PassOn(plan.families).heldout(count=plan.prompts)
    return {
        name: float(
            np.mean(
                [
                    mask.sum()
                    for task in tasks
                    for _, mask in chat.encode_demonstration((*task.prompt, form.answer(task)))
                ]
            )
        )
        for name, form in FORMS.items()
    }


def metrics_of(played: Mapping[str, Mapping[str, Played]], tokens: Mapping[str, float]) -> list[Metric]:
    """The table's lines, all for information."""
    counted = {"errors": ERRORS, "form_errors": FORM_ERRORS}
    lines = []
    for label in TEMPERATURES:
        for name in FORMS:
            one = played[name][label]
            for what, kinds in counted.items():
                lines += _with_interval(f"{name}/{label}/{what}", bootstrap_mean(one.per_1000(kinds), Bootstrap()))
            lines += [
                Metric(f"{name}/{label}/{kind}", float(one.per_1000([kind]).mean()), PER_1000, "") for kind in ERRORS
            ]
            impossible = one.per_1000(ERRORS, end_tag.__name__)
            lines.append(Metric(f"{name}/{label}/end_tag_errors", float(impossible.mean()), PER_1000, ""))
        for what, kinds in counted.items():
            dsml, fenced = (played[name][label].per_1000(kinds) for name in ("dsml", "json"))
            lines += _with_interval(f"dsml_less_json/{label}/{what}", bootstrap_gain(dsml, fenced, Bootstrap()))
    return [*lines, *(Metric(f"{name}/tokens_per_call", value, "tokens", "") for name, value in tokens.items())]


def _with_interval(name: str, estimate: Estimate) -> list[Metric]:
    bounds = (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high))
    return [Metric(f"{name}{end}", value, PER_1000, "") for end, value in bounds]


def details_of(played: Mapping[str, Mapping[str, Played]], families: Sequence[Family]) -> dict[str, Any]:
    """Errors by seed and by family, kinds with their intervals, and examples, for each form and temperature."""
    return {
        f"{name}/{label}": {
            "seeds": one.per_1000(ERRORS).mean(axis=0).tolist(),
            "kinds": {kind: _interval(one.per_1000([kind])) for kind in ERRORS},
            "faults": one.faults(),
            "families": {
                family.__name__: {kind: float(one.per_1000([kind], family.__name__).mean()) for kind in ERRORS}
                for family in (*families, end_tag)
            },
            "escapes": one.by_escapes(),
            "examples": {kind: one.examples(kind) for kind in ERRORS},
        }
        for name, by_label in played.items()
        for label, one in by_label.items()
    }


def draw(played: Mapping[str, Mapping[str, Played]]) -> Figure:
    """A bar of errors for each form and temperature, made of its kinds, with the interval of the sum."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    rows = [(label, name) for label in reversed(TEMPERATURES) for name in reversed(FORMS)]
    bars = [played[name][label] for label, name in rows]
    left = np.zeros(len(rows))
    for kind in ERRORS:
        widths = np.array([one.per_1000([kind]).mean() for one in bars])
        axes.barh(range(len(rows)), widths, left=left, height=0.6, label=kind.value)
        left += widths
    for row, one in enumerate(bars):
        value, low, high = _interval(one.per_1000(ERRORS))
        axes.plot([low, high], [row, row], color="black", linewidth=1)
        axes.annotate(f"{value:.0f}", (high, row), xytext=(4, -3), textcoords="offset points")
    axes.set_yticks(range(len(rows)), [f"{name}, {label}" for label, name in rows])
    axes.set_xlabel("errors per 1,000 calls")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _interval(scores: Scores) -> list[float]:
    found = bootstrap_mean(scores, Bootstrap())
    return [found.value, found.low, found.high]


FULL = Plan(
    model=SMOLLM2.path,
    copy_steps=20,
    copy_learning_rate=5e-4,
    steps=36,
    learning_rate=5e-4,
    batch_size=8,
    prompts=100,
    impossible=12,
    max_tokens=160,
)
QUICK = replace(
    FULL,
    model=TINY.path,
    copy_steps=100,
    copy_learning_rate=4e-3,
    steps=50,
    learning_rate=2e-3,
    prompts=40,
    impossible=8,
    families=(shell,),
)


def options_of(arguments_given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", help="of training and sampling, comma-separated")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the errors by kind")
    parser.add_argument("--model", help="a path as in a recipe")
    for name in ("copy_steps", "steps", "batch_size", "prompts"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("copy_learning_rate", "learning_rate"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    return parser.parse_args(arguments_given)


def plan_of(options: argparse.Namespace) -> Plan:
    """The quick or the full form, with what the options change."""
    changes = {field.name: getattr(options, field.name, None) for field in fields(Plan)}
    return replace(QUICK if options.quick else FULL, **{k: v for k, v in changes.items() if v is not None})


def main() -> None:
    options = options_of()
    plan = plan_of(options)
    seeds = [int(seed) for seed in (options.seeds or ("0" if options.quick else "0,1,2")).split(",")]
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        played = compare(plan, seeds, Path(folder))
    if options.plot:
        draw(played).savefig(options.plot, dpi=150, facecolor="white", metadata={"Software": None})
    settings = {name: value for name, value in asdict(plan).items() if name != "families"}
    report(
        "tool-call formats",
        metrics_of(played, tokens_per_call(plan)),
        options.json,
        settings=settings | {"seeds": seeds},
        details=details_of(played, plan.families),
    )


if __name__ == "__main__":
    main()
