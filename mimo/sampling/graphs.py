"""CUDA graphs: a part of a frame is captured once and replayed for every step and every frame."""

from collections.abc import Callable

import torch

from mimo_kernels.core import device_copies


class Replayed:
    """A function of static buffers. If `captures`, its second call is captured as a CUDA graph, and replayed later.

    The first call runs as it is: it compiles kernels and makes the buffers that a capture must find. Whatever the
    function reads has to stay at its address and be kept alive by others; a call that changes nothing but what lies
    there is the same graph.
    """

    def __init__(self, function: Callable[[], None], captures: bool):
        self.function, self.captures = function, captures
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.kept: dict | None = None  # the tables that the graph reads

    def __call__(self) -> None:
        if not self.captures or not self.warm:
            self.warm = True
            self.function()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # Weights that autocast has cast live as long as its context, the graph lives longer: cast them inside it.
            autocast = torch.autocast(
                "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
            )
            # Threads that load data or watch collectives go on with their own calls meanwhile.
            with (
                autocast,
                device_copies.kept() as self.kept,
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self.function()
            self.graph = graph
        self.graph.replay()
