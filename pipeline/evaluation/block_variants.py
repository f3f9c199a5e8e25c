"""Blocks of a model with the compressed matrices of a variant in place of its own.

The blocks of the base model are read once for all variants of a sweep: a block stays loaded, and only the matrices in
which the next variant differs are exchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.blocks.block import Block
from pipeline.blocks.layered_model import LayeredModel
from pipeline.blocks.runner import BlockKey, BlockRunner
from pipeline.blocks.skeleton import Skeleton
from pipeline.checkpoints.tensor_io import Payload
from pipeline.evaluation.perplexity import decoded
from pipeline.models.loading import ModelKey
from pipeline.models.parameter_lookup import ParameterView, find_matrix_parameter
from pipeline.models.stored_model import Model
from swsc_core.hf.weight_names import WeightNames


class VariantBlocks(BlockRunner):
    """Runs blocks of one model, whose matrices can be replaced by those of a variant."""

    def __init__(self, key: BlockKey, device: str) -> None:
        super().__init__(key, device)
        self._names = WeightNames(self.skeleton.model)
        self._present: Block | None = None
        self._variant: str | None = ""
        self._replaced: set[str] = set()
        self._views: dict[str, ParameterView] = {}

    def load_variant(
        self, block: Block, variant: str, weights: Mapping[str, Payload], upcoming: Block | None = None
    ) -> None:
        """Load a block with exactly the matrices in `weights` replaced, and begin to read the upcoming one.

        Matrices of the variant before are read again from the checkpoint, so that no second copy is kept in memory.

        Args:
            block: the block.
            variant: identifies the replacement; "" for the model without replacements.
            weights: matrix of the block -> its compressed parts.
            upcoming: the block that is probably loaded next.
        """
        if block != self._present:
            self._release_replaced()
            self._present = block
        self.load(block, upcoming)
        if variant == self._variant:
            return
        self._variant = None
        for name in sorted(self._replaced - weights.keys()):
            self._put(name, self.skeleton.source.read_matrix(name))
        for name, payload in weights.items():
            self._put(name, decoded(payload, self.device))
        self._replaced, self._variant = set(weights), variant

    def _release_replaced(self) -> None:
        """Release the parameters with replaced matrices, so that they are read again where they are needed."""
        replaced = {id(self._views[name].parameter) for name in self._replaced}
        parameters = dict(self.skeleton.model.named_parameters())
        self.skeleton.release([name for name, parameter in parameters.items() if id(parameter) in replaced])
        self._views.clear()
        self._replaced, self._variant = set(), ""

    @torch.inference_mode()  # it may change what a hook loaded in that mode
    def _put(self, name: str, weight: Tensor) -> None:
        if name not in self._views:
            tensor = self.skeleton.source.location(name).tensor or name
            self.skeleton.load(self._names.loaded_parameters([tensor]))
            self._views[name] = self._find(name)
        self._views[name].put(weight)

    def _find(self, name: str) -> ParameterView:
        """The part of a loaded parameter that holds a matrix; values are compared only where tensors are merged."""
        model, source = self.skeleton.model, self.skeleton.source
        location = source.location(name)
        tensor = location.tensor or name
        target = self._names.target(tensor)
        if target.pattern is not None or location.n_experts is not None:
            return find_matrix_parameter(model, source, name)
        view = ParameterView(model.get_parameter(target.parameter))
        return replace(view, transposed=location.transposed, row_blocks=location.row_blocks)


def matrices_of_blocks(
    source: Model, key: ModelKey, blocks: Sequence[Block], matrices: Sequence[str]
) -> list[tuple[str, ...]]:
    """For each block, those of some matrices that it computes with.

    A matrix outside the layers that is neither the input embedding nor the head belongs to all blocks, because the
    model's forward method uses it in the pass of every block.
    """
    skeleton = Skeleton(source, key, "cpu")
    layered = LayeredModel(skeleton)
    tensors = {name: source.location(name).tensor or name for name in matrices}
    used = [{*skeleton.stored_names(_used_by(layered, block))} for block in blocks]
    anywhere = set().union(*used)
    return [tuple(name for name, tensor in tensors.items() if tensor in own or tensor not in anywhere) for own in used]


def _used_by(layered: LayeredModel, block: Block) -> list[str]:
    """Parameters of a block's layers, and of the embedding or head that it uses."""
    first, last = layered.end_parameters
    return [*layered.parameters_of(block), *(first if block.is_first else ()), *(last if block.is_last else ())]
