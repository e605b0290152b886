"""The attention part of every layer as CUDA graphs: norm, projections, attention, residual; forward and backward.

Launching them one by one takes the host some milliseconds a layer (Transformer Engine's and Megatron's Python). Where a
GPU's part of a layer is small, that is what bounds a step; a graph is one launch. The sparse MLP stays outside: its
router changes the kernels that it launches.

A graph reads and writes the same memory each time. So a layer has one pair of graphs for each micro-batch that can be
between its forward and its backward: one without pipeline parallelism, else as many as the first step had. Pipeline
schedules run the backwards of a chunk in the order of its forwards, so the pairs are used in turns.

The forwards of one turn share a pool of memory: what one uses for itself alone, the next may keep for its backward, as
they always run in that order. Another turn's forwards run in between, so each turn has a pool of its own. All backwards
share one pool, as they keep nothing. They are captured when all forwards are: what they set free of the forwards' pools
is never given out again, so they may run in any order.

The backward adds the gradients of the weights to `main_grad` inside the graph and tells Megatron so, as fused weight
gradients do (`autograd.FusedWeightGrad`). Those of Megatron-Core (`TECudaGraphHelper`) need Transformer Engine and a
random state of its kind, and keep a gradient of every weight beside `main_grad`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.cuda_graphs import _set_capture_end, _set_capture_start
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import log_single_rank
from torch import Tensor, nn

from megasparse.megatron.autograd import added_to_main_grad

_log = logging.getLogger("megasparse")


class GraphedLayer(TransformerLayer):
    """A TransformerLayer whose attention part runs as CUDA graphs in training, once `AttentionGraphs` has them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention_graphs = LayerGraphs(self)

    def eager_attention(self, hidden_states: Tensor, settings: dict[str, Any]) -> Tensor:
        """[s, b, D] -> [s, b, D], launched kernel by kernel."""
        output, context = super()._forward_attention(hidden_states, **settings)
        assert context is None
        return output

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        if not (self.attention_graphs.use_graphs and self.training and torch.is_grad_enabled()):
            return super()._forward_attention(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        assert not args, "TransformerBlock passes all but the input by name"
        kwargs.pop("padding_mask", None)  # the MLP's
        return self.attention_graphs(hidden_states, kwargs), None


class LayerGraphs(nn.Module):
    """The attention part of one layer. A module, without parameters, for the hooks that name parts of a step."""

    def __init__(self, layer: GraphedLayer) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, lest it be taken for a child
        self.use_graphs = False
        """Whether training steps use graphs, and have them captured where there are none."""
        self.settings: dict[str, Any] = {}
        """Arguments of the last eager forward besides its input."""
        self.example: Tensor | None = None
        """Shape and type of its input; without memory."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.pairs: list[_Pair] = []
        self._turn = 0

    @property
    def layer(self) -> GraphedLayer:
        return self._layer[0]

    def has_graphs_for(self, hidden_states: Tensor) -> bool:
        """For its shape and type, that is."""
        return bool(self.pairs) and _alike(self.pairs[0].input, hidden_states)

    def forward(self, hidden_states: Tensor, settings: dict[str, Any]) -> Tensor:
        """[s, b, D] -> [s, b, D]."""
        if not self.has_graphs_for(hidden_states):
            return self._eager(hidden_states, settings)
        pair = self.pairs[self._turn]
        self._turn = (self._turn + 1) % len(self.pairs)
        if not _same(settings, pair.settings):
            self._refuse("other arguments than those that its CUDA graphs were captured with")
        if pair.busy:
            self._refuse(f"more micro-batches at a time than the {len(self.pairs)} that its CUDA graphs are for")
        return _Replay.apply(pair, hidden_states, *pair.parameters)  # type: ignore[no-any-return]

    def _eager(self, hidden_states: Tensor, settings: dict[str, Any]) -> Tensor:
        if any(pair.busy for pair in self.pairs):
            self._refuse("micro-batches of two shapes in one step")
        self.example = torch.empty_like(hidden_states, device="meta")
        self.settings = settings
        output = self.layer.eager_attention(hidden_states, settings)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        output.register_hook(self._landed)
        return output

    def _landed(self, _: Tensor) -> None:
        self.in_flight -= 1

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"layer {self.layer.layer_number - 1}: the attention part gets {what}; set training.cuda_graphs: false"
        )

    def begin_step(self) -> None:
        """Whatever became of the last step."""
        self.in_flight = self._turn = 0
        for pair in self.pairs:
            pair.busy = False


class AttentionGraphs:
    """The graphs of all layers of this rank's chunks."""

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        """`chunks`: GPTModel chunks of this rank, wrapped in DistributedDataParallel."""
        self._chunks: list[list[LayerGraphs]] = []
        for chunk in chunks:
            layers = [module for module in chunk.modules() if isinstance(module, LayerGraphs)]
            for layer in layers:
                layer.use_graphs = True
            self._chunks.append(layers)
        self._layers = [layer for chunk in self._chunks for layer in chunk]
        self.allocated = self.reserved = 0
        """Bytes that the graphs hold, in place of what the attention part would keep for its backward: of those that
        PyTorch counts as allocated, and in all."""

    def prepare_step(self) -> None:
        """Before a training step: captures where the last one ran kernel by kernel, which also warmed up what is
        captured. Launches nothing on the GPU."""
        for layer in self._layers:
            layer.begin_step()
        if any(
            layer.use_graphs and layer.example is not None and not layer.has_graphs_for(layer.example)
            for layer in self._layers
        ):
            self._capture()

    def release(self) -> None:
        """Frees all graphs. Before process groups end: NCCL waits for the graphs that launch its kernels."""
        for layer in self._layers:
            layer.pairs.clear()
        self.allocated = self.reserved = 0

    def _capture(self) -> None:
        self.release()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # pools get memory of their own, which the allocator's cache must not hold
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        examples = [layer.example for layer in self._layers if layer.example is not None]
        try:
            with _capturing():
                _capture_pairs(self._chunks, torch.empty_like(examples[0], device="cuda"))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the attention part of a layer could not be captured as a CUDA graph ({error}); train with "
                "training.cuda_graphs: false"
            ) from error
        self.allocated = torch.cuda.memory_allocated() - allocated
        self.reserved = torch.cuda.memory_reserved() - reserved
        at_once = "/".join(str(chunk[0].most_in_flight) for chunk in self._chunks)
        log_single_rank(
            _log,
            logging.INFO,
            f"CUDA graphs of the attention part: {len(examples)} layers, {at_once} micro-batches at a time, "
            f"{self.reserved / 2**30:.1f} GiB",
        )


class _Pair:
    """A layer's forward and backward as graphs, and the memory that they read and write."""

    def __init__(self, graphs: LayerGraphs, gradient: Tensor, leaves: bool) -> None:
        """
        Args:
            graphs: of the layer.
            gradient: like the input. Holds that of the output, then that of the input; shared by all pairs, of which
                one runs at a time.
            leaves: the gradient of the input is sent to another pipeline stage, while its memory here is used again.
        """
        self.layer = graphs.layer
        self.settings = graphs.settings
        self.input = torch.empty_like(gradient, requires_grad=True)
        self.output = self.input
        self.gradient = gradient
        self.leaves = leaves
        self.busy = False
        """Between forward and backward."""
        parts = (self.layer.input_layernorm, self.layer.self_attention)
        self.owners = [m for part in parts for m in part.modules() if any(True for _ in m.parameters(recurse=False))]
        self.parameters = [p for m in self.owners for p in m.parameters(recurse=False) if p.requires_grad]
        self._captured = [_alias(parameter) for parameter in self.parameters]
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def capture_forward(self, pool: Any) -> None:
        with (
            _exchanged(self.owners, dict(zip(self.parameters, self._captured, strict=True))),
            _fp8(self.layer.config, self.layer.layer_number, self.owners),
            _into(self._forward, pool),
        ):
            self.output = self.layer.eager_attention(self.input, self.settings)

    def capture_backward(self, pool: Any) -> None:
        with _into(self._backward, pool):
            found = torch.autograd.grad(self.output, [self.input, *self._captured], self.gradient)
            for parameter, gradient in zip(self._captured, found[1:], strict=True):
                if not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
                    parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]
            self.gradient.copy_(found[0])
        self.output = self.output.detach()
        self._captured.clear()

    def replay_forward(self, hidden_states: Tensor) -> Tensor:
        for module in self.owners:  # with overlap_param_gather they wait for their parameters
            for hook in tuple(module._forward_pre_hooks.values()):
                hook(module, ())
        self.input.copy_(hidden_states)
        self._forward.replay()
        self.busy = True
        return self.output.detach()

    def replay_backward(self, gradient: Tensor) -> Tensor:
        self.gradient.copy_(gradient)
        self._backward.replay()
        self.busy = False
        return self.gradient.clone() if self.leaves else self.gradient.detach()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: _Pair, hidden_states: Tensor, *_: Tensor) -> Tensor:
        ctx.pair = pair
        return pair.replay_forward(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_input = ctx.pair.replay_backward(gradient)
        return None, of_input, *(added_to_main_grad(parameter) for parameter in ctx.pair.parameters)


def _capture_pairs(chunks: Sequence[Sequence[LayerGraphs]], gradient: Tensor) -> None:
    """Of every layer one for each micro-batch in flight. `gradient`: see `_Pair`."""
    pairs: list[_Pair] = []
    for chunk in chunks:
        piped = chunk[0].layer.config.pipeline_model_parallel_size > 1
        for _ in range(chunk[0].most_in_flight):
            pool = torch.cuda.graph_pool_handle()
            for layer in chunk:
                pair = _Pair(layer, gradient, leaves=piped and layer is chunk[0])
                pair.capture_forward(pool)
                layer.pairs.append(pair)
                pairs.append(pair)
    pool = torch.cuda.graph_pool_handle()
    for pair in pairs:
        pair.capture_backward(pool)


@contextmanager
def _capturing() -> Iterator[None]:
    """On a stream of its own, Megatron's data-parallel hooks asleep."""
    stream = torch.cuda.Stream()
    _set_capture_start()
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        _set_capture_end()
    torch.cuda.synchronize()


@contextmanager
def _into(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    # Other threads (NCCL's watchdog, the one that reads data ahead) may use the GPU meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except Exception:
        with suppress(RuntimeError):  # that a capture was broken off; the reason is what to tell
            graph.capture_end()
        raise
    graph.capture_end()
    _give_out_again()


def _give_out_again() -> None:
    """Lets the next capture have the memory that this one has set free.

    What NCCL sent or received point to point (context parallelism) PyTorch gives out again when NCCL's stream is done
    with it, and asks that when it allocates outside captures: the first time it only records the events to ask for.
    """
    for _ in range(2):
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")


@contextmanager
def _fp8(config: TransformerConfig, layer_number: int, modules: Sequence[nn.Module]) -> Iterator[None]:
    """As `TransformerBlock` calls a layer, but that weights are quantised inside the graph, each time that it runs:
    outside, Transformer Engine's modules do so in the first micro-batch of a step alone."""
    keep = "disable_parameter_transpose_cache"
    before = {module: getattr(module, keep) for module in modules if hasattr(module, keep)}
    for module in before:
        setattr(module, keep, True)
    try:
        with get_fp8_context(config, layer_number - 1):
            yield
    finally:
        for module, value in before.items():
            setattr(module, keep, value)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory, and the same attributes of Megatron's, as another leaf. Autograd would have the default stream,
    on which the data-parallel hooks met the parameter itself first, take part in the capture, which CUDA refuses."""
    alias = nn.Parameter(parameter.detach())
    alias.__dict__.update(vars(parameter), grad_added_to_main_grad=False)
    return alias


@contextmanager
def _exchanged(owners: Sequence[nn.Module], others: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """The modules' own parameters give way to `others`."""
    places = [(m._parameters, name, p) for m in owners for name, p in m._parameters.items() if p in others]
    for parameters, name, parameter in places:
        parameters[name] = others[parameter]  # type: ignore[index]
    try:
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The very same tensors, whose memory the graphs read, and equal other values."""
    return one.keys() == other.keys() and all(
        value is other[key] or (not isinstance(value, Tensor) and value == other[key]) for key, value in one.items()
    )
