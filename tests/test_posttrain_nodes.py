"""A node of the cluster is lost while it generates, and another takes its place."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from posttrain.config import Workers
from posttrain.engine.weights import export_weights
from posttrain.models import load_model
from posttrain.rollout.actors import WorkerSpec
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.service import RolloutService
from posttrain.types import Group
from tests.test_posttrain_actors import duplicates_in_the_journal, jobs, process_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

WORKERS = Workers(threads_per_actor=1)
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without cores, so that engines are elsewhere, and one node."""
    checks = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    path = os.pathsep.join(filter(None, sys.path))
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_rollouts_of_a_lost_node_go_on_from_the_folder_both_share(cluster: Cluster, tiny_model: str, tmp_path: Path):
    spec = WorkerSpec(
        model_path=tiny_model, dtype="float32", max_length=64, workers=WORKERS, substrate=None, folder=tmp_path
    )
    weights = export_weights(load_model(tiny_model, torch.float32).named_parameters(), torch.float32)
    asked = jobs(SingleTurn(), count=60)
    (node,) = cluster.worker_nodes
    with RolloutService(spec) as service:
        service.load_weights(weights, 3)
        engine = service._engines[0].actor
        assert ray.get(engine.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == node.node_id
        service.submit(asked)
        while ray.get(engine.counters.remote())["decode_steps"] < 5:
            time.sleep(0.001)
        lost = [process_of(member.actor) for member in (*service._engines, *service._players)]
        # All of a node ends at once, while its processes would outlive their raylet by a second and finish the work.
        for pid in lost:
            os.kill(pid, signal.SIGSTOP)
        cluster.remove_node(node, allow_graceful=False)
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        cluster.add_node(**NODE)
        groups: dict[str, Group] = {}
        while len(groups) < len(asked):
            groups.update((job.id, group) for job, group in service.collect())
        assert duplicates_in_the_journal(service) == 0
        assert service.take_counters()["engines_replaced"] == 1
    rollouts = [rollout for group in groups.values() for rollout in group.rollouts]
    assert len(rollouts) == 3 * len(asked)
    assert not any(rollout.failed for rollout in rollouts)
    assert {rollout.tokens.version_range for rollout in rollouts} == {(3, 3)}
