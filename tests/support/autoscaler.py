"""Node provider with which Ray's autoscaler starts nodes in tests: processes on this machine."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LoopbackProvider(FakeMultiNodeProvider):
    """Ray's fake provider, for node types that state their memory, as real ones do; the fake one refuses these."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        without_memory = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, without_memory, labels)
