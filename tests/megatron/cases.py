"""What runs inside the worker processes of these tests, on the tiny model."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import build_module

from megasparse.megatron import SparseMLP, build_model, iter_sparse_mlps, layer_spec, transformer_config
from megasparse.megatron.attention_graphs import AttentionGraphs, LayerGraphs
from megasparse.megatron.init import fill_normal
from megasparse.megatron.torch_adam import prepare_torch_adam
from megasparse.training.save_helper import start_save_helper
from tests.megatron.tiny_model import SEQUENCE, Model, batch, dense_mlp, make_config, start


def gradients(config: dict[str, Any], model: dict[str, Any], step: dict[str, Any]) -> Any:
    """One forward and backward: (loss, gradient shards)."""
    cfg = make_config(**config)
    start(cfg)
    tiny = Model(cfg, **model)
    loss = tiny.forward_backward(**step)
    return loss, tiny.shards(gradients=True)


def statistics(
    config: dict[str, Any], model: dict[str, Any], step: dict[str, Any], eval_mode: bool, no_grad: bool
) -> Any:
    """One global batch: per sparse MLP (layer_index, tensor-parallel rank, its sums)."""
    cfg = make_config(**config)
    start(cfg)
    tiny = Model(cfg, **model)
    for chunk in tiny.ddp:
        chunk.train(not eval_mode)
    with torch.set_grad_enabled(not no_grad):
        tiny.forward_backward(**step)
    return [
        (
            mlp.layer_index,
            parallel_state.get_tensor_model_parallel_rank(),
            {
                "tokens": int(mlp.recorder.tokens),
                "active": int(mlp.recorder.active),
                "l1": float(mlp.recorder.l1),
                "tiles": int(mlp.recorder.tiles),
                "fired": mlp.recorder.fired.numpy().copy(),
            },
        )
        for mlp in iter_sparse_mlps(tiny.chunks)
    ]


def second_layer(changes: dict[str, Any], qk_norm: bool) -> str:
    """Builds the second layer of a model by a config with `changes`: "built", or why not."""
    cfg = make_config()
    start(cfg)
    config = dataclasses.replace(transformer_config(cfg), **changes)
    try:
        build_module(layer_spec("local", qk_norm=qk_norm), config=config, layer_number=2)
    except ValueError as error:
        return str(error)
    return "built"


def first_weights(config: dict[str, Any]) -> Any:
    cfg = make_config(**config)
    start(cfg)
    return Model(cfg).shards()


def _optimizer(tiny: Model) -> Any:
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0, weight_decay=0.1,
        adam_eps=1e-5,  # or Adam's first steps turn the rounding of gradients near zero into whole steps
        use_distributed_optimizer=tiny.cfg.parallel.distributed_optimizer,
        overlap_param_gather=tiny.ddp[0].ddp_config.overlap_param_gather,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, tiny.ddp)
    prepare_torch_adam(optimizer)
    return optimizer


def _state(tiny: Model, optimizer: Any, loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(tiny.chunks)
    }
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state


def train(
    config: dict[str, Any],
    model: dict[str, Any],
    steps: list[int],
    load: str | None = None,
    save: str | None = None,
) -> Any:
    """Train the steps, from a checkpoint and to one: (losses, gradient norms, weights)."""
    cfg = make_config(**config)
    start(cfg)
    tiny = Model(cfg, **model)
    optimizer = _optimizer(tiny)
    if load:
        loaded = dist_checkpointing.load(_state(tiny, optimizer, loading=True), load)
        for index, chunk in enumerate(tiny.chunks):
            chunk.load_state_dict(loaded[f"model{index}"])
        optimizer.load_state_dict(loaded["optimizer"])
    losses, norms = [], []
    for step in steps:
        optimizer.zero_grad()
        losses.append(tiny.forward_backward(step))
        fine, norm, _ = optimizer.step()
        assert fine
        norms.append(float(norm))
    if save:
        if torch.distributed.get_rank() == 0:
            Path(save).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        start_save_helper()
        dist_checkpointing.save(_state(tiny, optimizer, loading=False), save)
    return losses, norms, tiny.shards()


def oracle(config: dict[str, Any], coeff: list[float], masked: bool) -> Any:
    """The L1 term written into the loss: Megatron's dense MLP, autograd, the whole batch at once, no parallelism.

    Returns (gradient shards, per layer the sums that `statistics` returns).
    """
    cfg = make_config(**config)
    start(cfg)
    (chunk,) = build_model(cfg, layer=layer_spec("local", mlp=dense_mlp()))
    whole = batch(cfg, 0, masked)
    counted = whole["loss_mask"].bool().t()
    layers: list[dict[str, Any]] = []
    term = torch.zeros(())

    def observe(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal term
        gate, up = output[0].chunk(2, dim=-1) if cfg.model.gated else (output[0], torch.ones(()))
        total = (gate.relu() * up)[counted].abs().sum()
        term = term + coeff[len(layers)] / cfg.model.num_layers * total / counted.sum()
        active = (gate > 0)[counted]
        layers.append({
            "tokens": int(counted.sum()), "active": int(active.sum()), "l1": float(total),
            "fired": active.any(0).numpy(),
        })  # fmt: skip

    for layer in chunk.decoder.layers:
        layer.mlp.linear_fc1.register_forward_hook(observe)
    chunk(whole["tokens"], whole["position_ids"], None, labels=whole["labels"])
    term.backward()
    found = []
    for name, parameter in chunk.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append((name, gradient.numpy().copy(), -1, 1, 0))
    return found, layers


def sharded_keys(config: dict[str, Any], dense: bool) -> list[tuple[Any, ...]]:
    """What a checkpoint of the model holds of this rank: key, type, whole and local shape, offset, replica."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    cfg = make_config(**config)
    start(cfg)
    tiny = Model(cfg, dense=dense)
    found = []
    for chunk in tiny.chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for item in nested_values(state):
            if isinstance(item, ShardedTensor):
                where = (item.dtype, item.global_shape, item.local_shape, item.global_offset, item.axis_fragmentations)
                content = item.data.detach().double().sum().item()
            else:
                where, content = (item.global_shape, item.global_offset), 0.0
            found.append((type(item).__name__, item.key, *map(str, where), str(item.replica_id), content))
    return sorted(found)


def plain_state(config: dict[str, Any]) -> tuple[bool, bool]:
    """Plain state dicts: (sparse loads dense and computes the same, dense loads sparse and computes the same)."""
    cfg = make_config(**config)
    start(cfg)
    results = []
    for source_is_dense in (True, False):
        source, target = Model(cfg, dense=source_is_dense), Model(cfg, dense=not source_is_dense)
        with torch.no_grad():
            for chunk in source.chunks:
                for parameter in chunk.parameters():
                    parameter.add_(0.01 * torch.arange(parameter.numel()).view_as(parameter).sin())
        for ours, theirs in zip(target.chunks, source.chunks, strict=True):
            ours.load_state_dict(theirs.state_dict())
        results.append(abs(source.forward_backward() - target.forward_backward()) < 1e-5)
    return results[0], results[1]


def hybrid_mlp_layer(l1_layers: int, coeff: float) -> tuple[float, float]:
    """The `-` layer of hybrid models: (L1 gradient of its down projection's largest entry's size, sum of |h|)."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from megasparse.megatron import hybrid_mlp_layer_spec, transformer_config

    cfg = make_config()
    start(cfg)
    config = transformer_config(cfg)
    spec = hybrid_mlp_layer_spec("local", l1_coeff=coeff, l1_layers=l1_layers)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = build_module(spec, config=config, layer_number=3, pg_collection=groups)
    mlp = layer.mlp
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            fill_normal(parameter, name, 1, 0.2)
    x = torch.randn(SEQUENCE, 2, cfg.model.hidden_size, generator=torch.Generator().manual_seed(0))
    output, _ = layer(hidden_states=x, attention_mask=None)
    assert output.shape == x.shape
    assert mlp.layer_index == 2
    (output * 0.0).sum().backward()
    return float(mlp.linear_fc1.weight.grad.abs().max()), float(mlp.recorder.l1)


def where_gradients_go(offset: int, fsdp: bool = False) -> list[tuple[bool, bool]]:
    """Of each weight of one SparseMLP whose main gradients begin `offset` elements into their memory: whether they got
    something, and whether autograd is to bring the gradient. `fsdp`: marked as Megatron's FSDP marks its weights."""
    cfg = make_config()
    start(cfg)
    mlp = next(iter_sparse_mlps(build_model(cfg)))
    for weight in mlp.parameters():
        weight.main_grad = torch.zeros(weight.numel() + offset)[offset:].view_as(weight)
        weight.grad_added_to_main_grad = False
        if fsdp:
            weight.__fsdp_param__ = True
    mlp(torch.ones(SEQUENCE, 2, cfg.model.hidden_size))[0].sum().backward()
    return [(bool(weight.main_grad.any()), not weight.grad_added_to_main_grad) for weight in mlp.parameters()]


def mlp_beside_fp8(recipe: str) -> list[dict[str, np.ndarray]]:
    """Output and gradients of one SparseMLP without fp8 and with it in its config, prepared as for recomputing the norm
    before it."""
    from megatron.core.extensions.transformer_engine import set_save_original_input

    cfg = make_config()
    start(cfg)
    config = transformer_config(cfg)
    results = []
    for fp8 in (None, "hybrid"):
        mlp = SparseMLP(dataclasses.replace(config, fp8=fp8, fp8_recipe=recipe), l1_coeff=1e-2)
        for name, parameter in mlp.named_parameters():
            fill_normal(parameter, name, 1, 0.2)
        if fp8:
            set_save_original_input(mlp.linear_fc1)
        x = torch.randn(SEQUENCE, 2, cfg.model.hidden_size, generator=torch.Generator().manual_seed(0))
        output, _ = mlp(x.requires_grad_())
        output.square().sum().backward()
        gradients = {name: parameter.grad.numpy() for name, parameter in mlp.named_parameters()}
        results.append({"output": output.detach().numpy(), "input": x.grad.numpy(), **gradients})
    return results


def tile_unions(config: dict[str, Any]) -> tuple[int, int, int]:
    """(union, tiles, neurons of this rank) of one MLP and two sequences of 256 tokens, each using its half of them."""
    cfg = make_config(**config)
    start(cfg)
    mlp = next(iter_sparse_mlps(Model(cfg).chunks)).eval()
    x = torch.zeros(256, 2, cfg.model.hidden_size)
    x[:, :, 0] = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        weight = mlp.linear_fc1.weight
        weight[: mlp.hidden].zero_()
        weight[: mlp.hidden, 0] = 1 - 2.0 * (torch.arange(mlp.hidden) % 2)
        if cfg.parallel.sequence_parallel:
            x = x.chunk(cfg.parallel.tensor)[parallel_state.get_tensor_model_parallel_rank()]
        mlp(x)
    return int(mlp.recorder.union), int(mlp.recorder.tiles), mlp.hidden


def wrong_mask() -> None:
    cfg = make_config()
    start(cfg)
    mlp = next(iter_sparse_mlps(Model(cfg).chunks))
    mlp(torch.zeros(SEQUENCE, 2, cfg.model.hidden_size), padding_mask=torch.zeros(3, SEQUENCE, dtype=torch.bool))


def no_micro_batches() -> None:
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    cfg = make_config()
    start(cfg)
    tiny = Model(cfg, per_token=False)
    unset_num_microbatches_calculator()
    tiny.forward_backward()


def mlp_inside_fp8(recipe: str, path: str) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """On a GPU: output and gradients of one SparseMLP in bf16 outside and inside Transformer Engine's fp8 context, and
    recomputed inside; and a projection of Transformer Engine's, which the context must change. All as fp32."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, te_checkpoint
    from megatron.core.fp8_utils import get_fp8_context

    torch.cuda.set_device(0)
    sizes = {"model__hidden_size": 256, "model__ffn_hidden_size": 1024, "data__sequence_length": 256}
    cfg = make_config(**sizes, training__precision="bf16", training__fp8="hybrid", training__fp8_recipe=recipe)
    start(cfg)
    config = transformer_config(cfg)
    mlp = SparseMLP(config, path=path, l1_coeff=1e-2)
    for name, parameter in mlp.named_parameters():
        fill_normal(parameter, name, 1, 0.05)
    group = parallel_state.get_tensor_model_parallel_group()
    linear = TEColumnParallelLinear(
        256, 256, config=config, init_method=torch.nn.init.normal_, gather_output=False, bias=False,
        skip_bias_add=False, is_expert=False, tp_group=group,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(256, 4, 256, generator=generator).to("cuda", torch.bfloat16)

    def run(inside: bool, recomputed: bool) -> dict[str, np.ndarray[Any, Any]]:
        mlp.zero_grad()
        x = values.clone().requires_grad_()
        with get_fp8_context(config) if inside else contextlib.nullcontext():
            if recomputed:
                # A function: what Megatron hands over to recompute a whole layer.
                output, _ = te_checkpoint(partial(mlp), False, get_cuda_rng_tracker, group, x)
            else:
                output, _ = mlp(x)
            projected = linear(values)[0]
        output.float().square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in mlp.named_parameters()}
        tensors = {"output": output, "input's gradient": x.grad, **gradients, "projection": projected}
        return {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}

    return {"outside": run(False, False), "inside": run(True, False), "recomputed": run(True, True)}


def attention_in_flight(config: dict[str, Any]) -> Any:
    """A step whose layers would use CUDA graphs and have none: (micro-batches at a time in each layer, and left over at
    its end; gradient shards)."""
    cfg = make_config(**config)
    start(cfg)
    tiny = Model(cfg)
    AttentionGraphs(tiny.ddp)
    tiny.forward_backward()
    layers = [module for chunk in tiny.ddp for module in chunk.modules() if isinstance(module, LayerGraphs)]
    return [(layer.most_in_flight, layer.in_flight) for layer in layers], tiny.shards(gradients=True)
