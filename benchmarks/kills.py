"""``kill -9``, again and again, of engines, workers and the driver with its learner, over a real run.

    python -m benchmarks.kills [--quick] [--kills N] [--json FILE]

The run is cut from the quickstart: two specialists, one of which works with tools in a sandbox, their merge and its
proof, in float32 and in step. It is made twice from the same seed: once left alone, once with a process killed every
few seconds and resumed where the driver was killed. Then every rollout that was trained on or measured must be the
same, word for word, with the same score and advantage. 100 kills take 20 minutes; with ``--quick`` there are 4, which
takes four minutes, since the run alone takes more than one.

Tokens decoded twice are counted without the help of the journal: in every process that decodes, each token is noted in
a file of its own after the journal has it. What a kill interrupts within a decode step, before anything was written, is
not yet a token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.measure import Metric, arguments, report
from posttrain.config import Recipe
from recipes import quickstart

console = Console(stderr=True)

WITNESS = """
import os
try:
    from posttrain.engine import file_journal
except Exception:
    file_journal = None
if file_journal is not None:
    plain = file_journal.FileJournal.append
    def append(self, rows):
        gained = [(row.request.id, row.recorded, len(row.token_ids)) for row in rows]
        plain(self, rows)
        lines = "".join(f"{name} {i}\\n" for name, first, end in gained for i in range(first, end))
        path = os.path.join(os.environ["POSTTRAIN_WITNESS"], str(os.getpid()))
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, lines.encode())
        os.close(file)
    file_journal.FileJournal.append = append
"""

SIGNS = {"engine": "ray::EngineActor", "worker": "ray::RolloutWorker"}


def recipe() -> Recipe:
    """Small enough to be killed often, with everything that can be interrupted."""
    whole = quickstart.recipe()
    assert whole.distill is not None
    domains = {}
    for name in ("math", "agent"):
        domain = whole.domains[name]
        assert domain.sft is not None
        assert domain.grpo is not None
        grpo = domain.grpo.replace(max_steps=10, groups_per_step=8, num_generations=8, save_steps=2)
        domains[name] = domain.replace(sft=domain.sft.replace(max_steps=6, save_steps=2), grpo=grpo)
    return whole.replace(
        name="kills",
        domains=domains,
        distill=whole.distill.replace(max_steps=6, rollouts_per_step=32, save_steps=2),
        evaluation=whole.evaluation.replace(num_tasks=24, num_samples=2),
        # Here it is not the job's fault that its worker dies again and again.
        workers=whole.workers.replace(threads_per_actor=1, hang_timeout_s=60.0, max_retries=100),
    )


class Run:
    """A run in a process of its own, started again when it was killed."""

    def __init__(self, folder: Path, witness: Path | None = None) -> None:
        self.folder = folder
        self._environment = dict(os.environ)
        if witness is not None:
            (witness / "sitecustomize.py").write_text(WITNESS)
            (witness / "tokens").mkdir()
            path = os.pathsep.join([str(witness), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
            self._environment |= {"PYTHONPATH": path, "POSTTRAIN_WITNESS": str(witness / "tokens")}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "posttrain.cli", "run", str(Path(__file__).absolute())]
        resume = ["--resume"] if (self.folder / "recipe.json").exists() else []
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--run-dir", str(self.folder), *resume],
            env=self._environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def victims(self) -> dict[str, int]:
        """Process ids by part; only parts that are up."""
        found = {}
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                title = " ".join(child.cmdline())
                found |= {part: child.pid for part, sign in SIGNS.items() if sign in title}
        except psutil.Error:
            return {}
        return found | ({"driver": self.process.pid} if found else {})

    def kill(self, part: str, pid: int) -> None:
        if part != "driver":
            os.kill(pid, signal.SIGKILL)
            return
        # Ray's own helpers take a minute to notice; the next run does not need them gone.
        children = [psutil.Process(victim) for victim in self.victims().values()]
        os.kill(pid, signal.SIGKILL)
        self.process.wait()
        # What the driver had started ends by itself.
        give_up = time.monotonic() + 60
        while any(map(is_alive, children)) and time.monotonic() < give_up:
            time.sleep(0.05)
        self.start()

    def finished(self) -> bool:
        """Whether it has ended well; a run that fails is an error."""
        code = self.process.poll()
        if code:
            log = self.folder.parent / f"{self.folder.name}.log"
            raise RuntimeError(f"the run ended with status {code}:\n{log.read_text()[-3000:]}")
        return code == 0


def is_alive(process: psutil.Process) -> bool:
    """Not so the dead that nobody has waited for."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def disturb(run: Run, kills: int, rng: random.Random) -> Counter[str]:
    """Kill until there were enough, then let the run end; returns how often each part was killed."""
    killed: Counter[str] = Counter()
    while not run.finished():
        time.sleep(0.05)
        victims = run.victims()
        if killed.total() >= kills or len(victims) < 3:
            continue
        time.sleep(rng.uniform(0, 1.5))
        victims = run.victims()
        # Drivers take longest to come back.
        part = rng.choices(["engine", "worker", "driver"], [3, 3, 2])[0]
        if part in victims and not run.finished():
            run.kill(part, victims[part])
            killed[part] += 1
            console.print(f"{killed.total()} of {kills}: killed {part}; {where(run.folder)}", highlight=False)
    return killed


def where(folder: Path) -> str:
    """The last step that was logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    with_step: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return f"{with_step.get('stage', 'nothing logged yet')} {with_step.get('step', '')}"


def rollouts_of(folder: Path) -> dict[str, Any]:
    """What was recorded of each rollout, without what tells how it went and how long it took."""
    found = {}
    for path in sorted(folder.glob("stages/*/rollouts.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            told = {name: value for name, value in record.items() if name not in ("wall_s", "failures")}
            found[f"{path.parent.name}/{record['model']}/{record['step']}/{record['id']}"] = told
    return found


def decoded(witness: Path) -> Iterator[str]:
    for path in (witness / "tokens").iterdir():
        yield from path.read_text().splitlines()


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--kills", type=int, help="how many; 100 if it is left out, 4 with --quick")
    options = parser.parse_args()
    kills = options.kills or (4 if options.quick else 100)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "witness").mkdir()
        began = time.monotonic()
        alone = Run(root / "alone")
        while not alone.finished():
            time.sleep(0.2)
        alone_s = time.monotonic() - began
        console.print(f"undisturbed: {alone_s:.0f} s")
        disturbed = Run(root / "disturbed", root / "witness")
        killed = disturb(disturbed, kills, random.Random(0))
        disturbed_s = time.monotonic() - began - alone_s
        expected, found = rollouts_of(alone.folder), rollouts_of(disturbed.folder)
        counts = Counter(decoded(root / "witness"))
        different = [name for name in expected.keys() & found.keys() if not same(expected[name], found[name])]
    for name in different[:3]:
        console.print(
            name, {key: (old, found[name][key]) for key, old in expected[name].items() if old != found[name][key]}
        )
    metrics = [
        Metric("kills", killed.total(), "kills", f">= {kills}"),
        *(Metric(f"kills_{part}", count, "kills", "") for part, count in sorted(killed.items())),
        Metric("tokens_decoded", len(counts), "tokens", ""),
        Metric("tokens_decoded_twice", sum(count > 1 for count in counts.values()), "tokens", "<= 0"),
        Metric("rollouts", len(expected), "rollouts", ""),
        Metric("rollouts_lost", len(expected.keys() ^ found.keys()), "rollouts", "<= 0"),
        Metric("rollouts_different", len(different), "rollouts", "<= 0"),
        Metric("undisturbed", alone_s, "s", ""),
        Metric("disturbed", disturbed_s, "s", ""),
    ]
    report("kill -9 over a run", metrics, options.json)


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit; what is not a number equals itself."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other or (one != one and other != other))


if __name__ == "__main__":
    main()
