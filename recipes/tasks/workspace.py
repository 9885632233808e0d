"""Chores in a small tree of files, done with tools: the agent tasks that a policy climbs, in five difficulties.

A task is a numbered list of steps over generated CSV, JSON, configuration, log and text files. Its end state is the
whole tree: what has to be there and nothing else, so that neither doing nothing nor leaving copies behind passes
(``FinalStateReward(exact=True)`` with ``ToolCalling(keep="tree")``). Nothing of the grading is in the box.

Each chore also says how a scripted solver does it, call by call with the answers it gets. These are the demonstrations.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import random
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Literal

from posttrain.conversation.dsml import call_row, tool_row
from posttrain.conversation.effort import NON_THINK
from posttrain.conversation.tool_calls import describe_tools, format_tool_call
from posttrain.errors import RecipeError
from posttrain.types import Message, SandboxSpec, Task, Tool, ToolCall
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id
from recipes.tasks.words import WORDS
from sandbox.tools import BoxTools, numbered, replace_once

EXPLANATION = (
    "You work with tools on the files in /work. Do all of the steps and leave everything else as it is; what "
    "you note for yourself goes to /tmp. In the end submit the files that you wrote, changed or moved."
)
SILENT = "(no output)"
AWKWARD_NAMES = ("{} (1).txt", "{}'s.txt", "{} & co.txt", "${}.txt")
PHRASES = (
    'He said "it\'s {}" and left',
    "echo \"${}\" | tr -d '\\n' # `date`",
    '{{"path": "C:\\\\{}", "text": "a \\"b\\" c"}}',
    "if [ \"$1\" = '{}' ]; then printf '%s\\\\n' \"$1\"; fi",
    '<b class="{}">it\'s &amp; \\t 100%</b>',
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What one difficulty asks for."""

    chores: int
    """That depend on no other."""
    dependent: int = 0
    """That need the result of another."""
    report: bool = False
    """Whether the last step collects all results."""
    distractors: int = 0
    """Look-alike rows and files for each chore, which a careless filter takes for wanted ones."""
    failures: int = 0
    """Tool failures after which the same command works; 0: no command that fails."""
    awkward: bool = False
    """Whether names and texts are full of quotes, blanks and dollar signs."""


LEVELS: Mapping[int, Level] = {
    1: Level(chores=1),
    2: Level(chores=1, dependent=1),
    3: Level(chores=2, dependent=1, report=True, distractors=1),
    4: Level(chores=3, dependent=1, report=True, distractors=2, failures=1, awkward=True),
    5: Level(chores=4, dependent=2, report=True, distractors=4, failures=3, awkward=True),
}


@dataclass(frozen=True, slots=True)
class Move:
    """A call of the scripted solver and what it is answered."""

    call: ToolCall
    answer: str


@dataclass(slots=True, kw_only=True)
class Draft:
    """A task in the making: chores write into it."""

    rng: random.Random
    level: Level
    files: dict[str, str] = field(default_factory=dict)
    """As the policy finds them."""
    end: dict[str, str] = field(default_factory=dict)
    """As they have to be."""
    results: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By name: how a step refers to the result of an earlier one, and the result."""

    def bring(self, files: Mapping[str, str]) -> None:
        self.files |= files
        self.end |= files

    def words(self, count: int) -> list[str]:
        return self.rng.sample(WORDS, count)

    def bash(self, command: str, output: str = "") -> Move:
        return Move(ToolCall("bash", {"command": command}), output or SILENT)

    def read(self, path: str) -> Move:
        lines = self.end[path].removesuffix("\n").split("\n")
        return Move(ToolCall("read", {"path": path}), numbered(lines, 0, len(lines)))

    def write(self, path: str, content: str) -> Move:
        self.end[path] = content
        answer = f"(wrote {len(content.encode())} bytes to {path})"
        return Move(ToolCall("write", {"path": path, "content": content}), answer)

    def edit(self, path: str, old: str, new: str) -> Move:
        self.end[path], shown = replace_once(self.end[path], old, new)
        return Move(ToolCall("edit", {"path": path, "old": old, "new": new}), shown)

    def rename(self, moved: Mapping[str, str]) -> Move:
        """New path by old one."""
        for old, new in moved.items():
            self.end[new] = self.end.pop(old)
        folder = posixpath.dirname(next(iter(moved.values())))
        pairs = [f"mv {shlex.quote(old)} {shlex.quote(new)}" for old, new in moved.items()]
        return self.bash(" && ".join([f"mkdir -p {folder}", *pairs]))


@dataclass(frozen=True, slots=True)
class Step:
    """What is asked, and the turns of the solver, each with the calls that it makes at once."""

    request: str
    turns: Sequence[Sequence[Move]]


Chore = Callable[[Draft], Step]


def total_orders(draft: Draft) -> Step:
    """Add up one customer's rows of a CSV file."""
    customer, *others = draft.words(4)
    rng, path, target = draft.rng, "data/orders.csv", "out/total.txt"
    wanted = [(customer, rng.choice(others)) for _ in range(rng.randint(2, 4))]
    rest = [(other, rng.choice(others)) for other in others]
    noise = [rng.choice([(others[0], customer), (f"{customer}son", others[1])]) for _ in range(draft.level.distractors)]
    rows = [(*row, rng.randint(2, 60)) for row in (*wanted, *rest, *noise)]
    rng.shuffle(rows)
    lines = ["order,customer,item,quantity", *(f"{i},{c},{item},{n}" for i, (c, item, n) in enumerate(rows, 100))]
    draft.bring({path: _text(lines)})
    total = str(sum(n for name, _, n in rows if name == customer))
    draft.results["total"] = ("the total of the quantities", total)
    look = draft.bash(f"awk -F, '$2 == \"{customer}\" {{ n += $4 }} END {{ print n }}' {path}", total)
    return Step(
        f"Add up the quantities of the customer {customer} in {path} and write the total to {target}.",
        [[look], [draft.write(target, f"{total}\n")]],
    )


def count_errors(draft: Draft) -> Step:
    """Count one worker's errors over several logs."""
    rng, target = draft.rng, "out/errors.txt"
    worker = rng.randint(2, 9)
    shapes = ["{} worker-{} ERROR disk full", "{} worker-{} INFO done", "{} worker-{} WARN slow"]
    traps = [f"{{}} worker-1{worker} ERROR disk full", f"{{}} worker-{worker} INFO ERROR page shown"]
    count = 0
    for name in ("day1", "day2"):
        lines = []
        for shape in [shapes[0], *rng.choices(shapes, k=3), *rng.choices(traps, k=draft.level.distractors)]:
            line = shape.format(f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}", rng.choice([worker, worker - 1]))
            count += f" worker-{worker} ERROR " in line
            lines.append(line)
        draft.bring({f"logs/{name}.log": _text(lines)})
    draft.results["errors"] = ("the number of errors", str(count))
    ended = "" if count else "\n(exit code 1)"
    return Step(
        f"Count the lines of level ERROR from worker-{worker} in all files of logs and write the number to {target}.",
        [
            [draft.bash(f"cat logs/*.log | grep -c ' worker-{worker} ERROR '", f"{count}{ended}")],
            [draft.write(target, f"{count}\n")],
        ],
    )


def sort_inbox(draft: Draft) -> Step:
    """Move the files that mention a word."""
    rng = draft.rng
    word, *others = draft.words(7)
    names = rng.sample(AWKWARD_NAMES, 2) if draft.level.awkward else ["{}.txt"]
    notes = [f"The {word} is here.", f"Buy a {word} today.", *(f"No {other} today." for other in others[:2])]
    notes += rng.choices([f"All {word}s are gone.", f"Ask for un{word}."], k=draft.level.distractors)
    labels = rng.sample([f"{other}{i}" for other in others for i in range(9)], len(notes))
    found = {
        f"inbox/{rng.choice(names).format(label)}": _text([note]) for label, note in zip(labels, notes, strict=True)
    }
    draft.bring(dict(sorted(found.items())))
    moved = sorted(path for path, note in found.items() if note.strip() in notes[:2])
    draft.results["moved"] = ("the number of files that you moved", str(len(moved)))
    look = draft.bash(f"grep -lw {word} inbox/*", "\n".join(moved))
    return Step(
        f"Move the files in inbox that contain the word {word} (as a word of its own) to archive, under their names.",
        [[look], [draft.rename({path: path.replace("inbox/", "archive/", 1) for path in moved})]],
    )


def repair_customers(draft: Draft) -> Step:
    """Put a missing comma into a JSON file."""
    rng, path = draft.rng, "data/customers.json"
    names = draft.words(4 + draft.level.distractors)
    codes = rng.sample(range(100, 1000), len(names))
    people = [{"name": name, "code": f"{rng.choice('AKX')}{code}"} for name, code in zip(names, codes, strict=True)]
    rows = list(map(json.dumps, people))
    broken, asked = rng.randrange(len(rows) - 1), rng.randrange(len(rows))
    commas = ["" if index in (broken, len(rows) - 1) else "," for index in range(len(rows))]
    draft.bring({path: _text(["[", *(f"  {row}{comma}" for row, comma in zip(rows, commas, strict=True)), "]"])})
    draft.results["code"] = (f"the code of {names[asked]} in {path}", people[asked]["code"])
    return Step(
        f"{path} is no valid JSON: a comma is missing at the end of a line. Put it there.",
        [[draft.read(path)], [draft.edit(path, rows[broken], f"{rows[broken]},")]],
    )


def rename_parts(draft: Draft) -> Step:
    """Name files after a code inside them."""
    rng = draft.rng
    names = sorted(draft.words(2 + draft.level.distractors))
    codes = rng.sample([f"{letter}{number}" for letter in "BCDF" for number in range(10, 99)], 2 * len(names))
    found = {f"parts/{name}.txt": code for name, code in zip(names, codes, strict=False)}
    draft.bring(
        {
            path: _text([f"code: {code}", f"old code: {other}"])
            for (path, code), other in zip(found.items(), codes[len(names) :], strict=True)
        }
    )
    look = draft.bash("grep '^code: ' parts/*", "\n".join(f"{path}:code: {c}" for path, c in found.items()))
    return Step(
        "Rename each file in parts to the code in its first line, followed by .txt.",
        [[look], [draft.rename({path: f"parts/{code}.txt" for path, code in found.items()})]],
    )


def fetch_token(draft: Draft) -> Step:
    """Get a value from a command that fails at first."""
    name, salt = draft.words(2)
    path, target, failures = "bin/fetch.sh", "out/token.txt", draft.level.failures
    program = (
        "# Prints the token of a name. Often busy: exit code 75.",
        'echo try >> "/tmp/fetch-$1"',
        f'if [ "$(wc -l < "/tmp/fetch-$1")" -le {failures} ]; then echo "busy, try again"; exit 75; fi',
        f"printf '%s' \"{salt}:$1\" | sha256sum | cut -c1-8",
    )
    draft.bring({path: _text(program)})
    token = hashlib.sha256(f"{salt}:{name}".encode()).hexdigest()[:8]
    draft.results["token"] = (f"the token of {name}", token)
    command = f"sh {path} {name}"
    busy = [[draft.bash(command, "busy, try again\n(exit code 75)")] for _ in range(failures)]
    return Step(
        f"Run `{command}`, again while it is busy, and write the token that it prints to {target}.",
        [*busy, [draft.bash(command, token)], [draft.write(target, f"{token}\n")]],
    )


def set_config(draft: Draft) -> Step:
    """Set a key in one of the sections that have it."""
    rng, path = draft.rng, "config/service.ini"
    sections = draft.words(2 + draft.level.distractors)
    section = rng.choice(sections)
    body = {
        name: [f"port = {rng.randint(1000, 9999)}", "mode = on", f"limit = {rng.randint(300, 999)}"]
        for name in sections
    }
    draft.bring({path: "\n".join(_text([f"[{name}]", *lines]) for name, lines in body.items())})
    told, value = _earlier(draft)
    old = "\n".join([f"[{section}]", *body[section]])
    new = "\n".join([f"[{section}]", *body[section][:2], f"limit = {value}"])
    return Step(
        f"In the section {section} of {path} set limit to {told}.",
        [[draft.read(path)], [draft.edit(path, old, new)]],
    )


def write_phrase(draft: Draft) -> Step:
    """Write a line that is hard to quote, with an earlier result behind it."""
    told, value = _earlier(draft)
    (word,) = draft.words(1)
    phrase = draft.rng.choice(PHRASES).format(word) if draft.level.awkward else f"The word is {word}"
    target = "notes/phrase.txt"
    return Step(
        f"Write one line to {target}: first exactly what stands on the next line, then a blank and {told}.\n{phrase}",
        [[draft.write(target, f"{phrase} {value}\n")]],
    )


CHORES: tuple[Chore, ...] = (total_orders, count_errors, sort_inbox, repair_customers, rename_parts)
DEPENDENT: tuple[Chore, ...] = (set_config, write_phrase)


def report(draft: Draft) -> Step:
    """Collect all results so far."""
    target = "out/report.json"
    wanted = ", ".join(f'"{name}" ({told})' for name, (told, _) in draft.results.items())
    content = json.dumps({name: value for name, (_, value) in draft.results.items()}, indent=2)
    return Step(
        f"Write {target}: a JSON object, indented by two blanks, with these keys in this order and strings as values: "
        f"{wanted}.",
        [[draft.write(target, f"{content}\n")]],
    )


@dataclass(frozen=True)
class WorkspaceTasks(DrawnTasks):
    """Chores of one difficulty. ``info["expected_files"]`` is the whole tree as it has to be at the end.

    ``RecipeError`` for a difficulty or form that there is not.
    """

    difficulty: int = 1
    """1 to 5, as in ``LEVELS``."""
    form: Literal["dsml", "fence"] = "dsml"
    """How calls are written: V4's, several in a turn, or one JSON block a turn for any chat template."""
    effort: str = NON_THINK
    """Mode of tasks and demonstrations; the scripted solver says nothing about why."""

    def __post_init__(self) -> None:
        if self.difficulty not in LEVELS or self.form not in ("dsml", "fence"):
            raise RecipeError(
                f"WorkspaceTasks: difficulty = {self.difficulty!r}, form = {self.form!r}; expected a difficulty from "
                f"{min(LEVELS)} to {max(LEVELS)} and the form 'dsml' or 'fence'; correct them"
            )

    def draw(self, rng: random.Random) -> SolvedTask:
        draft = Draft(rng=rng, level=LEVELS[self.difficulty])
        steps, turns = _steps(draft)
        request = "\n".join(f"{number}. {step.request}" for number, step in enumerate(steps, 1))
        changed = sorted(path for path, text in draft.end.items() if draft.files.get(path) != text)
        turns.append([Move(ToolCall("submit", {"paths": changed}), "")])
        files = {path: text.encode() for path, text in draft.files.items()}
        task = Task(
            id=problem_id("workspace", request, sorted(draft.files.items())),
            domain="agent",
            prompt=(self._system(), {"role": "user", "content": request}),
            sandbox=SandboxSpec(files=files),
            info={"expected_files": draft.end},
            effort=self.effort,
        )
        said = _parallel(turns) if self.form == "dsml" else _one_by_one(turns)
        # The episode ends with the submission, which nobody answers.
        return SolvedTask(task=task, solution=tuple(said)[:-1])

    def _system(self) -> Message:
        if self.form == "fence":
            return {"role": "system", "content": f"{EXPLANATION}\n\n{describe_tools(_tools())}", "effort": self.effort}
        return {
            "role": "system",
            "content": EXPLANATION,
            "tools": [tool_row(tool) for tool in _tools()],
            "effort": self.effort,
        }


@cache
def _tools() -> Sequence[Tool]:
    return BoxTools().definitions


def _steps(draft: Draft) -> tuple[list[Step], list[list[Move]]]:
    """The steps as they are asked, and the solver's turns: independent chores side by side, then what needs them."""
    level = draft.level
    first = draft.rng.sample(CHORES, level.chores)
    if level.dependent and not set(first) - {rename_parts}:
        first = [total_orders]
    if level.failures:
        first[-1] = fetch_token
    steps = [chore(draft) for chore in first]
    side_by_side = zip_longest(*(step.turns for step in steps), fillvalue=())
    turns = [[move for part in parts for move in part] for parts in side_by_side]
    later = [chore(draft) for chore in draft.rng.sample(DEPENDENT, level.dependent)]
    later += [report(draft)] if level.report else []
    return [*steps, *later], turns + [list(turn) for step in later for turn in step.turns]


def _parallel(turns: Iterable[Sequence[Move]]) -> Iterable[Message]:
    for turn in turns:
        yield {"role": "assistant", "content": "", "tool_calls": [call_row(move.call) for move in turn]}
        for move in turn:
            yield {"role": "tool", "content": move.answer}


def _one_by_one(turns: Iterable[Sequence[Move]]) -> Iterable[Message]:
    for move in (move for turn in turns for move in turn):
        yield {"role": "assistant", "content": format_tool_call(move.call)}
        yield {"role": "tool", "content": move.answer}


def _earlier(draft: Draft) -> tuple[str, str]:
    """How to refer to some earlier result, and what it is."""
    return draft.rng.choice(list(draft.results.values()))


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
