"""Keeps the accuracy with unlabelled images: every layer of the smaller network solved for the original's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from intrafusion.arguments import Seed, checked
from intrafusion.graph import ChannelGraph
from intrafusion.network.apart import borrow
from intrafusion.network.batches import ImagesLike
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.tensors import check_graph, copy_model
from intrafusion.restore.restorer import Reduced, require_images
from intrafusion.restore.solver import LayerSolver
from intrafusion.surgery.write import write_weights_

T = TypeVar("T")


@checked
@dataclass(frozen=True)
class LeastSquares:
    r"""Solve every layer of the smaller network for the outputs of the original one, on unlabelled images.

    Two forward passes in all, more where layers run more than once. The first stores rows y of the original network's
    outputs. The second runs the smaller network; when it reaches a layer, whose inputs x then come from restored
    layers, the layer becomes

        W, b  <-  argmin  mean || M y - (W x + b) ||^2 + lam || W - W_0 ||^2,

    from k rows of d inputs, with M the merge of the group that the layer produces, W_0 its weights after the reduction
    and lam = (strength + scarcity d / k) mean var x. Behind a batch norm, y is what the norm gives. Where the output
    enters a sum with another branch s, the sum is the target: M (y + s) minus the other branch of the smaller network
    as it has become. Where only an activation function f reads y, `steps` further solutions lead towards

        mean (M f(y) - f(W x + b)) x^T  =  lam (W - W_0),

    the least matching loss of f: an error counts as far as f lets it through (see `Ridge.solve`).

    How strong the ridge is, is chosen layer by layer on one image in five, on which the layer is not solved meanwhile:
    the least strength, unless a larger one, a constant alone or no change at all is clearly better there, see
    `choose_strength`. Then all images are solved on; of the steps, the last.

    Norms over channels of which some are gone (a LayerNorm in a stream that was selected from) are fitted where they
    are reached: gain and shift of each channel, for what the original's norm gave, see `NormFits`.

    What is solved: convolutions, transposed ones too, and linear layers; each group of a grouped or depthwise
    convolution by itself (`GroupedRidge`); layers that run more than once in a forward pass for all their calls, where
    the network keeps no state; weights that functions multiply with (`BareLayer`), as attention's projections, where
    nothing else reads them. Tied and reparametrised weights are left alone. Images go through in batches, which wait
    for each other at each layer: it is solved on all of them. What they hold meanwhile, and the stored rows, lie in a
    temporary file where they exceed 128 MiB; a layer with d inputs to each output takes `rows` * 4 d
    bytes for them and 24 d^2 bytes for the solution.
    OURS: no paper is known to us that does this for channel fusion.

    Attributes:
        strength: of the ridge, as a fraction of the inputs' mean variance; infinite for constants alone. None: chosen
            for each layer; 1e-3 where there are fewer than 26 images.
        scarcity: what is added to it where rows are few for the size of a filter, as in a classifier on few images.
        steps: further solutions for what comes out of an activation function.
        rows: sampled places per layer.
        drift: solve for sums instead of for their summands.
        seed: for the sampling of rows.
    """

    strength: float | None = None
    scarcity: float = 0.2
    steps: int = 3
    rows: int = 20_000
    drift: bool = True
    seed: Seed = 0

    needs_data = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        self.solver  # noqa: B018  # refuses hyper-parameters that mean nothing

    @property
    def solver(self) -> LayerSolver:
        return LayerSolver(self.strength, self.scarcity, self.steps, self.rows, self.drift, self.seed)

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None
    ) -> None:
        """Write the solved weights into `compressed.model`, or on any error none of them.

        Args:
            reference: the original network; left as it was.
            graph: the channel graph of the original network.
            images: unlabelled, as the networks take them; a few hundred are enough. See `batches`.
        Raises:
            ModelError: no images, a network that gives NaN on them, or a full disk.
        """
        check_graph(graph, reference)
        reference = borrow(reference)
        inputs = read_input_batches(require_images(images, self), reference)
        small = copy_model(compressed.model).eval()
        solved = self.solver.solve_(small, compressed.plan.maps, reference, graph, inputs, memory=inputs.memory)
        new = {name: tensor.detach() for name, tensor in solved.written.items()}
        write_weights_(compressed.model, {**new, **solved.norms})

    def restore(
        self,
        compressed: Reduced,
        original: nn.Module,
        graph: ChannelGraph,
        images: Batches,
        reference: nn.Module,
        measure: Callable[[nn.Module], T],
    ) -> tuple[T, T]:
        """The same, measured.

        Args:
            reference: the original network as it is to be seen on these images; here, itself.
            measure: of a network, such as its error.
        Returns:
            what that is of the smaller network before and after.
        """
        before = measure(compressed.model)
        self(compressed, reference, graph, images)
        return before, measure(compressed.model)
