"""Rollouts whose actor is killed and that go on in the box they had."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from posttrain.config import Workers
from posttrain.errors import RecipeError, SandboxError, SandboxLost, SandboxUnavailable
from posttrain.protocols import Environment, KeepsBoxes, Sandbox, Substrate
from posttrain.rollout.actors import WorkerSpec
from posttrain.rollout.environments import ToolUse
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.rollout.samples import rollout_metrics
from posttrain.rollout.service import RolloutService, ray_session
from posttrain.types import Message, Sampling, SandboxSpec, StopReason, Task, ToolCall
from sandbox.edge import Limits
from sandbox.edge_client import EdgeClient
from sandbox.edge_server import SOCKET
from sandbox.kept import Kept, edge_pid, socket_in
from sandbox.local import LocalUnsafe
from sandbox.log import RecordKind, TrajectoryLog
from sandbox.process import Process
from sandbox.tools import BoxTools
from tests.boxes import require
from tests.tiny_models import END, ScriptedEngine, save_tiny_model, tiny_chat

pytestmark = pytest.mark.timeout(120)

LOCAL = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
NUM_COMMANDS = 5
KILLED_AT = 2
WORKERS = Workers(threads_per_actor=1, max_retries=1, episode_deadline_s=40.0, max_concurrent_sandboxes=2)
GIVE_UP_S = 60.0


@dataclass(frozen=True)
class Counts:
    """Every turn of the policy runs the next command of a fixed list, each of which adds a line to a file.

    The first process that gets to command ``KILLED_AT`` names itself in ``folder/NAME`` and waits for its end: with the
    command's result in hand, or, where ``name`` is "amid", while the command runs.
    """

    folder: Path
    name: str
    max_turns: int = NUM_COMMANDS + 1

    def start(self, task: Task, sandbox: Sandbox | None) -> CountingEpisode:
        assert sandbox is not None
        return CountingEpisode(self, sandbox)


class CountingEpisode:
    def __init__(self, rules: Counts, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._mark = rules.folder / rules.name
        self._amid = rules.name == "amid"
        self._turn = 0

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        turn, self._turn = self._turn, self._turn + 1
        if turn == NUM_COMMANDS:
            return None
        pause = "sleep 2; " if turn == KILLED_AT and self._amid else ""
        running = asyncio.create_task(self._sandbox.exec(f"echo {turn} >> f; {pause}cat f", timeout_s=20))
        if turn == KILLED_AT and not self._mark.is_symlink():
            await (asyncio.sleep(0.5) if self._amid else running)
            self._mark.symlink_to(str(os.getpid()))
            await asyncio.sleep(GIVE_UP_S)
        return ({"role": "tool", "content": (await running).stdout.decode()},)

    async def artifacts(self) -> Mapping[str, bytes]:
        return {name: await self._sandbox.read(name) for name in await self._sandbox.list()}


@pytest.fixture(scope="module")
def silent_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that ends every turn with its first token."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "silent")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    head = torch.zeros_like(model.lm_head.weight)
    head[END] = 1.0
    model.lm_head.weight = torch.nn.Parameter(head)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def isolated() -> Process:
    return require(Process())


def kill_when_named(marks: list[Path]) -> None:
    give_up = time.monotonic() + GIVE_UP_S
    while not all(mark.is_symlink() for mark in marks) and time.monotonic() < give_up:
        time.sleep(0.01)
    os.kill(int(str(marks[0].readlink())), signal.SIGKILL)


def boxes_of(kept: Kept) -> list[dict[str, str]]:
    async def ask() -> list[dict[str, str]]:
        with socket_in(kept.edge_folder) as path:
            async with EdgeClient(path) as edge:
                return await edge.list()

    return asyncio.run(ask())


def job(name: str, environment: Environment) -> GroupJob:
    play = Play(environment=environment, reward=None, sampling=Sampling(max_tokens=80), max_sequence_tokens=250)
    task = Task(id="t", domain="d", prompt=({"role": "user", "content": "count"},), sandbox=SandboxSpec())
    return GroupJob(id=name, task=task, num_rollouts=1, play=play, seed=1)


def test_rollouts_whose_actor_is_killed_go_on_in_their_boxes(silent_model, isolated, tmp_path):
    names = ["between", "amid", "between"]
    jobs = [job(f"s/{i}", Counts(tmp_path, name)) for i, name in enumerate(names)]
    killer = threading.Thread(target=kill_when_named, args=([tmp_path / "between", tmp_path / "amid"],))
    # Boxes left by the dead actor count, too, and there is room for no more than it may hold.
    limits = Limits(max_boxes=WORKERS.max_concurrent_sandboxes, max_waiting=0)
    with ray_session(WORKERS), Kept(base=isolated, limits=limits).for_run(tmp_path / "run") as kept:
        spec = WorkerSpec(model_path=silent_model, dtype="float32", max_length=256, workers=WORKERS, substrate=kept)
        edge = psutil.Process(edge_pid(kept.edge_folder))
        killer.start()
        with RolloutService(spec) as service:
            rollouts = [rollout for group in service.play(jobs) for rollout in group.rollouts]
            assert service.take_counters()["workers_replaced"] == 1
        boxes = boxes_of(kept)
        started = edge.children(recursive=True)
    for rollout in rollouts:
        assert (rollout.stop, rollout.failures) == (StopReason.FINISHED, ())
        told = [message["content"] for message in rollout.messages if message["role"] == "tool"]
        assert told == ["".join(f"{i}\n" for i in range(n + 1)) for n in range(NUM_COMMANDS)]
    # One box a rollout, the first two of which had two players, and in its log each command once, with one result.
    held = sorted((box["rollout_id"], box["state"], box["epoch"]) for box in boxes)
    assert held == [("/s/0/0@0", "closed", 2), ("/s/1/0@0", "closed", 2), ("/s/2/0@0", "closed", 1)]
    for box in boxes:
        with contextlib.closing(TrajectoryLog.open(kept.edge_folder / "boxes" / box["box_id"])) as log:
            kinds = [log.record(seq).kind for seq in range(len(log))]
            assert [operation.kind for operation in log.operations] == ["exec"] * NUM_COMMANDS + ["list", "read"]
            assert kinds.count(RecordKind.INTENT) == kinds.count(RecordKind.RESULT) == NUM_COMMANDS + 2
    edge.wait(timeout=20)
    assert psutil.wait_procs(started, timeout=20)[1] == []


def test_a_rollout_that_cannot_be_repeated_starts_over_and_says_why(tmp_path):
    async def die(kept: Kept) -> None:
        with socket_in(kept.edge_folder) as path:
            async with EdgeClient(path) as edge:
                await (await edge.create("/s/0@0", SandboxSpec())).exec("echo 1 >> f")

    engine = ScriptedEngine(lambda request: "```bash\necho 2 >> f; cat f\n```" if request.id == "s/0/0" else "done")
    with Kept(base=LOCAL).for_run(tmp_path) as kept:
        asyncio.run(die(kept))
        player = Player(engine=engine, judge_engine=None, chat=tiny_chat(), substrate=kept, workers=WORKERS)
        [group] = asyncio.run(player.play([job("s", ToolUse())]))
        boxes = [(box["rollout_id"], box["state"]) for box in boxes_of(kept)]
    [rollout] = group.rollouts
    assert rollout.turns[0].observations[0]["content"] == "2"
    assert (rollout.stop, len(rollout.failures)) == (StopReason.FINISHED, 1)
    assert rollout.failures[0].startswith("Diverged: operation 1: the log holds exec('echo 1 >> f')")
    assert rollout_metrics([group])["repeated_attempts"] == 1.0
    assert boxes == [("/s/0@0", "closed"), ("/s/0@1", "closed")]


def test_a_box_that_is_gone_still_answers_what_it_was_asked(tmp_path):
    async def play(kept: Kept) -> list[bytes]:
        async with kept.open_for("r", SandboxSpec()) as box:
            results = [(await box.exec("echo x >> f; cat f")).stdout for _ in range(2)]
            return [*results, await box.read("f")]

    async def ask_more(kept: Kept) -> None:
        async with kept.open_for("r", SandboxSpec()) as box:
            for _ in range(2):
                await box.exec("echo x >> f; cat f")
            await box.read("f")
            with pytest.raises(SandboxLost, match="closed by its client"):
                await box.exec("echo x >> f; cat f")

    with Kept(base=LOCAL).for_run(tmp_path) as kept:
        asyncio.run(play(kept))
        assert asyncio.run(play(kept)) == [b"x\n", b"x\nx\n", b"x\nx\n"]
        asyncio.run(ask_more(kept))


def test_an_edge_that_was_killed_is_started_again_and_its_boxes_are_lost(tmp_path):
    async def play(kept: Kept) -> None:
        async with kept.open_for("r@0", SandboxSpec()) as box:
            await box.write("f", b"1")
            killed = edge_pid(kept.edge_folder)
            os.kill(killed, signal.SIGKILL)
            started = time.monotonic()
            with pytest.raises(SandboxLost, match="the edge that held it ended"):
                await box.exec("cat f")
            assert time.monotonic() - started < 20
        async with kept.open_for("r@1", SandboxSpec(files={"f": b"2"})) as box:
            assert (await box.exec("cat f")).stdout == b"2"
        assert edge_pid(kept.edge_folder) != killed

    with Kept(base=LOCAL).for_run(tmp_path) as kept:
        asyncio.run(play(kept))


def test_an_edge_that_nobody_uses_ends_by_itself(tmp_path):
    async def leave(kept: Kept) -> None:
        with socket_in(kept.edge_folder) as path:
            async with EdgeClient(path) as edge:
                await edge.create("r", SandboxSpec())

    with Kept(base=LOCAL, keep_s=0.5, limits=Limits(lease_s=0.5)).for_run(tmp_path) as kept:
        edge = psutil.Process(edge_pid(kept.edge_folder))
        asyncio.run(leave(kept))
        edge.wait(timeout=20)
        assert edge_pid(kept.edge_folder) is None
        # The next one to ask has another, which knows what became of the box.
        kept.start_edge()
        assert [box["cause"] for box in boxes_of(kept)] == ["the edge was stopped"]


def test_two_that_start_an_edge_get_the_same(tmp_path):
    with Kept(base=LOCAL).for_run(tmp_path) as kept:
        [killed] = edges_of(kept)
        killed.kill()
        killed.wait(timeout=20)
        threads = [threading.Thread(target=kept.start_edge) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [edge.pid for edge in edges_of(kept)] == [edge_pid(kept.edge_folder)]


def test_an_edge_that_cannot_start_says_why(tmp_path):
    with Kept(base=LOCAL).for_run(tmp_path) as kept:
        [holder] = edges_of(kept)
        (kept.edge_folder / SOCKET).unlink()
        with pytest.raises(SandboxUnavailable, match=r"could not be started: .* another edge serves this folder"):
            kept.start_edge()
        holder.terminate()
        holder.wait(timeout=20)


def edges_of(kept: Kept) -> list[psutil.Process]:
    """The processes that hold the folder, whether or not they can be reached."""
    lock = str(kept.edge_folder / "lock")
    named = [p for p in psutil.process_iter(["cmdline"]) if "sandbox.kept_edge" in (p.info["cmdline"] or [])]
    return [process for process in named if lock in {file.path for file in process.open_files()}]


def test_kept_is_a_value_that_says_what_it_is():
    kept = Kept(base=LOCAL)
    assert isinstance(kept, Substrate)
    assert isinstance(kept, KeepsBoxes)
    assert not isinstance(LOCAL, KeepsBoxes)
    assert pickle.loads(pickle.dumps(kept)) == kept
    assert kept.capabilities() == {**LOCAL.capabilities(), "survives_client": True}
    with pytest.raises(RecipeError, match=r"Kept\.keep_s = 0"):
        Kept(keep_s=0)
    with pytest.raises(SandboxError, match=r"within Kept\.for_run"):
        kept.start_edge()


def test_tools_go_on_in_the_shell_they_had(isolated, tmp_path):
    # A shell that ran these again would draw another number.
    commands = ["mkdir d; cd d; x=$RANDOM$RANDOM", "echo $x"]

    async def work(box: Sandbox, *more: str) -> list[str]:
        tools = BoxTools(timeout_s=20.0).start(box)
        calls = [ToolCall("bash", {"command": command}) for command in (*commands, *more)]
        return [(await tools.call(call)).text for call in calls]

    async def die(kept: Kept) -> list[str]:
        with socket_in(kept.edge_folder) as path:
            async with EdgeClient(path) as edge:
                return await work(await edge.create("r", SandboxSpec()))

    async def go_on(kept: Kept) -> list[str]:
        async with kept.open_for("r", SandboxSpec()) as box:
            return await work(box, "echo $x; pwd")

    with Kept(base=isolated).for_run(tmp_path) as kept:
        told = asyncio.run(die(kept))
        assert asyncio.run(go_on(kept)) == [*told, f"{told[1]}\n/work/d"]
