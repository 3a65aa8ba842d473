"""A Ray cluster on this machine, whose nodes come and go."""

from __future__ import annotations

from types import TracebackType
from typing import Any

# A node that is killed is given up when its connection breaks; this is for one that only stops answering.
_HEALTH = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}


class Nodes:
    """A cluster of a head and others, one processor each; a context."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": _HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        found: str = self._cluster.address
        return found

    def add(self) -> Any:
        """A new node; its ``node_id`` is what workers have as theirs."""
        return self._cluster.add_node(num_cpus=1)

    def kill(self, node: Any) -> None:
        """End all processes of a node at once."""
        self._cluster.remove_node(node, allow_graceful=False)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()
