"""Jobs of restoring: dense weights of some tensors, and low-rank parts for a LoRA adapter."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.lora_export import adapter_tensors
from pipeline.models.stored_model import opened_once


@dataclass(frozen=True)
class RestoreTensors:
    """Dense weights of compressed tensors of the model at `location`; the payload is their file.

    Attributes:
        without_low_rank: those of `names` whose low-rank part is left out, because an adapter carries it.
    """

    location: str
    names: tuple[str, ...]
    without_low_rank: frozenset[str] = frozenset()

    def run(self, context: JobContext) -> JobOutput[None]:
        model = context.model(opened_once, self.location)
        parts = (to_stored_tensor(name, model.read(name, name in self.without_low_rank)) for name in self.names)
        return JobOutput(None, (Payload(tuple(parts)),))


@dataclass(frozen=True)
class ExtractLowRank:
    """Low-rank parts of tensors of the model at `location`, as a LoRA adapter's; the payload is its file.

    Attributes:
        carried: tensor -> linear layer.
    """

    location: str
    carried: Mapping[str, str]

    def run(self, context: JobContext) -> JobOutput[None]:
        tensors = adapter_tensors(context.model(opened_once, self.location), self.carried)
        return JobOutput(None, (Payload(tuple(to_stored_tensor(name, tensor) for name, tensor in tensors)),))
