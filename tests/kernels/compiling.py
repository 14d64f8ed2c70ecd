"""Compilation as for a GPU that is not there, and what comes of it."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from normkit.kernels import select


@contextmanager
def as_on_a_gpu():
    """Inside, ``torch.compile`` treats maps on the CPU as if they were on a GPU.

    The operator of the graph is then the CPU's, or Triton's in the interpreter.
    """
    with (
        patch.dict(select._BEST, cpu="triton"),
        patch.object(select, "_why_not_triton", lambda device: None),
    ):
        yield


class Graphs:
    """A backend that notes the graphs after autograd, and runs them as they are."""

    def __init__(self):
        self.forward, self.backward = [], []

    def compile(self, module, **options):
        """The module, compiled whole; its memory is chosen as by inductor."""
        torch.compiler.reset()
        backend = aot_autograd(
            fw_compiler=lambda graph, _: self._note(self.forward, graph),
            bw_compiler=lambda graph, _: self._note(self.backward, graph),
            partition_fn=min_cut_rematerialization_partition,
        )
        return torch.compile(module, fullgraph=True, backend=backend, **options)

    def _note(self, found, graph):
        found.append(graph.graph)
        return make_boxed_func(graph.forward)


def operators(graph):
    """Names of what a graph calls."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def ours(graph):
    """Names of our operators that a graph calls."""
    return [name for name in operators(graph) if name.startswith("normkit.")]


def saved(forward, num_outputs=1):
    """Tensors that a forward graph keeps for the backward graph."""
    (output,) = (node for node in forward.nodes if node.op == "output")
    kept = output.args[0][num_outputs:]
    return [node.meta["val"] for node in kept if isinstance(node.meta["val"], torch.Tensor)]
