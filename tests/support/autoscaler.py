"""What Ray's autoscaler starts nodes with in tests: processes of this machine."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LoopbackProvider(FakeMultiNodeProvider):
    """Ray's own feigned provider; it refuses nodes whose type has an amount of memory, as types of real ones have."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        bare = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, bare, labels)
