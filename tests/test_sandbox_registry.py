"""What the service knows, decides and counts, without a cluster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SandboxUnavailable
from sandbox.registry import QuotaExceeded, Registry, ServiceLimits, choose

LABELS = {"owner": "ann"}
SERVED = {"process": "", "container": "no daemon"}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with contextlib.closing(Registry(tmp_path)) as registry:
        for number in range(2):
            name = registry.add_edge(f"node{number}", f"host{number}", alive=["node0", "node1"])
            registry.edge_is_up(name, pid=number + 1, substrates=SERVED)
        yield registry


def place(registry: Registry, rollout: str, **options: Any) -> dict[str, Any] | None:
    settings: dict[str, Any] = {"substrate": "process", "labels": LABELS, "deadline_s": 0.0, "max_boxes": 2, **options}
    return registry.place(rollout, "token", **settings)


def reported(box: dict[str, Any], state: str, cause: str = "") -> dict[str, Any]:
    ended_s = time.time() if state in ("lost", "closed") else None
    return {**box, "state": state, "cause": cause, "ended_s": ended_s}


def test_the_roomier_of_two_is_chosen_and_a_full_one_never() -> None:
    assert {choose({"a": 3, "b": 1}) for _ in range(20)} == {"a"}
    assert {choose({"a": 0, "b": 1}) for _ in range(20)} == {"b"}
    assert choose({"a": 0}) is choose({}) is None
    drawn = [choose({"a": 3, "b": 2, "c": 1}) for _ in range(300)]
    assert set(drawn) == {"a", "b"}, "the least roomy of three never wins, the second does when the first is not drawn"


def test_placing_takes_room_and_ending_gives_it_back(registry: Registry) -> None:
    boxes = [place(registry, f"r{number}") for number in range(4)]
    assert sorted(box["edge"] for box in boxes if box) == ["e0", "e0", "e1", "e1"]
    assert place(registry, "r4") is None
    assert boxes[0] is not None
    registry.note(boxes[0]["edge"], [reported(boxes[0], "closed", "closed by its client")])
    assert place(registry, "r4", edge="e0" if boxes[0]["edge"] == "e1" else "e1") is None
    again = place(registry, "r4")
    assert again is not None
    assert again["edge"] == boxes[0]["edge"]
    assert again["box_id"].startswith(again["edge"] + "-")


def test_a_substrate_that_no_edge_serves_is_refused_with_each_edges_reason(registry: Registry) -> None:
    with pytest.raises(SandboxUnavailable, match=r"'container': no edge serves it \(e0: no daemon; e1: no daemon\)"):
        place(registry, "r", substrate="container")
    with pytest.raises(SandboxUnavailable, match="expected one of process"):
        place(registry, "r", substrate="nonsense")
    for name in ("e0", "e1"):
        registry.lose_edge(name, "its node died")
    with pytest.raises(SandboxUnavailable, match="no edge of this service is up"):
        place(registry, "r")


def test_quotas_hold_per_value_and_for_one_value(registry: Registry) -> None:
    quotas = {"owner": 2, "job=big": 1}
    place(registry, "a", labels={"owner": "ann", "job": "big"})
    with pytest.raises(QuotaExceeded, match="job=big has 1 boxes and quota 'job=big' allows 1"):
        registry.check_quotas({"owner": "bob", "job": "big"}, quotas)
    registry.check_quotas({"owner": "bob", "job": "small"}, quotas)
    registry.check_quotas(LABELS, quotas)
    place(registry, "b")
    with pytest.raises(QuotaExceeded, match="owner=ann has 2 boxes"):
        registry.check_quotas(LABELS, quotas)
    registry.lose(registry.live("e0") + registry.live("e1"), "gone")
    registry.check_quotas(LABELS, quotas)


def test_what_is_lost_stays_lost_and_what_nobody_knows_is_unwanted(registry: Registry) -> None:
    box, other = place(registry, "a", edge="e0"), place(registry, "b", edge="e0")
    assert box is not None
    assert other is not None
    stranger = {**box, "box_id": "stranger"}
    assert registry.note("e0", [reported(box, "open"), reported(stranger, "open")]) == ["stranger"]
    assert registry.note("e0", [reported(stranger, "closed")]) == []
    registry.lose_edge("e0", "its node died")
    assert registry.note("e0", [reported(box, "open"), reported(other, "closed")]) == [box["box_id"]]
    for row in registry.boxes():
        assert (row["state"], row["cause"]) == ("lost", "edge e0 is lost: its node died")


def test_a_node_of_the_same_host_takes_up_the_edge_of_a_dead_one(registry: Registry) -> None:
    assert registry.add_edge("node2", "host2", alive=["node0", "node1", "node2"]) == "e2"
    assert registry.add_edge("node3", "host1", alive=["node0", "node2", "node3"]) == "e1"
    assert registry.edge("e1")["node_id"] == "node3"
    registry.lose_edge("e0", "it has not answered")
    assert registry.add_edge("node4", "host0", alive=["node0", "node4"]) == "e0"


def test_everything_is_there_for_the_next_process(registry: Registry, tmp_path: Path) -> None:
    box = place(registry, "r")
    with contextlib.closing(Registry(tmp_path)) as other:
        assert other.newest("r") == box
        assert [edge["state"] for edge in other.edges()] == ["up", "up"]
        other.lose([row["box_id"] for row in other.boxes()], "gone", created_before_s=time.time() - 60)
        assert other.newest("r") == box, "a young one may still be on its way"
        other.lose([row["box_id"] for row in other.boxes()], "gone")
        other.forget(time.time() - 60)
        assert other.newest("r")
        other.forget(time.time() + 1)
    assert registry.newest("r") is None


@pytest.mark.parametrize(
    ("options", "message"), [({"wait_s": 0}, r"wait_s = 0"), ({"quotas": {"owner": -1}}, r"owner = -1")]
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServiceLimits(**options)
