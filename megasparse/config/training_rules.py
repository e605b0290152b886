"""Rules of how a model is trained: recomputation, CUDA graphs, fp8, schedules, the L1 term."""

from __future__ import annotations

from collections.abc import Iterator

from megasparse.config.errors import Problem
from megasparse.config.model_rules import near_multiple
from megasparse.config.schema import Config


def _recompute(cfg: Config) -> Iterator[Problem]:
    training = cfg.training
    if training.recompute_layers is None:
        return
    chunk = cfg.chunk_layers
    if training.recompute != "full":
        yield Problem(
            "training.recompute_layers",
            f"means nothing with training.recompute: {training.recompute}",
            "set training.recompute: full, or leave it out",
            training.recompute_layers,
        )
    elif chunk and training.recompute_layers > chunk:
        yield Problem(
            "training.recompute_layers",
            f"a pipeline chunk has {chunk} layers",
            f"set at most {chunk}",
            training.recompute_layers,
        )


def _cuda_graphs(cfg: Config) -> Iterator[Problem]:
    training, model = cfg.training, cfg.model
    if not training.cuda_graphs:
        return
    rest = "training.cuda_graphs: false"
    if training.fp8 != "off" and training.fp8_recipe == "delayed":
        rule = "under delayed scaling the host makes scales of what earlier steps noted, and graphs hold kernels alone"
        fix = f"set training.fp8_recipe: tensorwise or blockwise, or {rest}"
        yield Problem("training.cuda_graphs", rule, fix, True)
    modules = set(training.recompute_modules) - {"mlp"} if training.recompute == "selective" else set()
    if modules or training.recompute == "full":
        rule = "the attention part, which is what the graphs hold, is not recomputed"
        fix = f"set training.recompute: none, or selective with recompute_modules: [mlp], or {rest}"
        yield Problem("training.cuda_graphs", rule, fix, True)
    for key in ("attention_dropout", "hidden_dropout"):
        if getattr(model, key) > 0:
            rule = f"a graph draws no random numbers, and model.{key} is {getattr(model, key)}"
            yield Problem("training.cuda_graphs", rule, f"set model.{key}: 0, or {rest}", True)
    if cfg.data.reset_attention_mask:
        rule = "data.reset_attention_mask gives each micro-batch a mask of its own, and graphs read one memory"
        yield Problem("training.cuda_graphs", rule, f"set data.reset_attention_mask: false, or {rest}", True)


def _fp8(cfg: Config) -> Iterator[Problem]:
    training, model = cfg.training, cfg.model
    if training.fp8 == "off":
        return
    if training.precision != "bf16":
        yield Problem(
            "training.fp8",
            f"stands beside bf16, and training.precision is {training.precision}",
            "set training.precision: bf16, or fp8: off",
            training.fp8,
        )
    if model.implementation == "local":
        yield Problem(
            "training.fp8",
            "is Transformer Engine's, and model.implementation is local",
            "set model.implementation: auto or te, or fp8: off",
            training.fp8,
        )
    yield from _fp8_recompute(cfg)
    yield from _fp8_sizes(cfg)


def _fp8_recompute(cfg: Config) -> Iterator[Problem]:
    training = cfg.training
    if training.recompute != "selective":
        return
    if "layernorm" in training.recompute_modules and training.fp8_recipe == "delayed":
        yield Problem(
            "training.recompute_modules",
            "Megatron-Core recomputes no layernorm under training.fp8_recipe: delayed",
            "leave layernorm out, or set training.fp8_recipe: tensorwise or blockwise",
            list(training.recompute_modules),
        )
    if "mlp" in training.recompute_modules:
        # Megatron-Core hands it to Transformer Engine's checkpoint, which leaves modules that are not its own to
        # PyTorch's, and that one refuses the padding mask.
        yield Problem(
            "training.recompute_modules",
            "with training.fp8, Transformer Engine recomputes the mlp, and only its own",
            "leave mlp out, or set training.recompute: full",
            list(training.recompute_modules),
        )


def _fp8_sizes(cfg: Config) -> Iterator[Problem]:
    """Every side of an 8-bit product on one GPU is a multiple of 16: cuBLAS asks for rows aligned to 16 bytes, and the
    backward multiplies by either matrix transposed."""
    model, parallel, training = cfg.model, cfg.parallel, cfg.training
    # Sequence parallelism gathers quantised inputs, which blockwise scaling cuts into whole blocks of 128 only.
    blocks = training.fp8_recipe == "blockwise" and parallel.sequence_parallel
    multiple = 128 if blocks else 16
    why = "blockwise scaling under sequence parallelism" if blocks else "training.fp8"
    if model.hidden_size % multiple:
        yield Problem(
            "model.hidden_size",
            f"{why} needs a multiple of {multiple}",
            f"set {near_multiple(model.hidden_size, multiple)}, or training.fp8: off",
            model.hidden_size,
        )
    heads, groups, width, tensor = model.num_attention_heads, model.query_groups, model.head_width, parallel.tensor
    sides = {"attention's output": heads * width, "queries, keys and values": (heads + 2 * groups) * width}
    for name, whole in sides.items():
        if whole % tensor == 0 and whole // tensor % 16:
            yield Problem(
                "training.fp8",
                f"each GPU's share of the {name} is {whole // tensor} wide, not a multiple of 16",
                "change model.kv_channels, the numbers of heads or parallel.tensor, or set fp8: off",
                training.fp8,
            )
    share = parallel.context * (tensor if parallel.sequence_parallel else 1)
    tokens = training.micro_batch_size * cfg.data.sequence_length
    if tokens % (share * multiple):
        yield Problem(
            "training.micro_batch_size",
            f"{why} needs a multiple of {multiple} tokens on each GPU; {training.micro_batch_size} x "
            f"data.sequence_length = {cfg.data.sequence_length} over {share} GPU{'s' if share > 1 else ''} is not",
            "change it or data.sequence_length, or set training.fp8: off",
            training.micro_batch_size,
        )


def _schedule(cfg: Config) -> Iterator[Problem]:
    schedule, steps = cfg.optimizer.schedule, cfg.training.steps
    if schedule.warmup_steps > steps:
        yield Problem(
            "optimizer.schedule.warmup_steps",
            f"more than training.steps = {steps}",
            f"set at most {steps}",
            schedule.warmup_steps,
        )
    elif schedule.kind == "wsd":
        if schedule.decay_steps is None:
            yield Problem(
                "optimizer.schedule.decay_steps",
                "kind: wsd needs the length of its final decay",
                f"set for example {max(1, steps // 5)} (a fifth of training.steps)",
                None,
            )
        elif schedule.warmup_steps + schedule.decay_steps > steps:
            yield Problem(
                "optimizer.schedule.decay_steps",
                f"warm-up ({schedule.warmup_steps}) and final decay take longer than training.steps = {steps}",
                f"set at most {steps - schedule.warmup_steps}",
                schedule.decay_steps,
            )
    elif schedule.kind in ("cosine", "linear"):
        end = schedule.decay_steps or steps
        if schedule.decay_steps is not None and end > steps:
            yield Problem(
                "optimizer.schedule.decay_steps",
                f"min_lr would be reached after training.steps = {steps}",
                f"set at most {steps}, or leave it out",
                end,
            )
        elif end <= schedule.warmup_steps:
            yield Problem(
                "optimizer.schedule.warmup_steps",
                f"leaves no step to decay: the decay ends at step {end}",
                f"set less than {end}",
                schedule.warmup_steps,
            )
    elif schedule.decay_steps is not None:
        yield Problem(
            "optimizer.schedule.decay_steps",
            "means nothing with kind: constant",
            "leave it out",
            schedule.decay_steps,
        )
    if cfg.optimizer.min_lr > cfg.optimizer.lr:
        yield Problem(
            "optimizer.min_lr",
            f"above optimizer.lr = {cfg.optimizer.lr}",
            "set it lower than lr",
            cfg.optimizer.min_lr,
        )


def _l1(cfg: Config) -> Iterator[Problem]:
    l1, model, steps = cfg.sparsity.l1, cfg.model, cfg.training.steps
    if l1.mode == "off":
        return
    if l1.start_step >= steps:
        yield Problem(
            "sparsity.l1.start_step",
            f"never reached: training.steps = {steps}",
            f"set less than {steps}",
            l1.start_step,
        )
    if l1.mode == "target":
        targets = l1.target_l0 if isinstance(l1.target_l0, tuple) else (l1.target_l0,)
        if l1.target_l0 is None:
            yield Problem(
                "sparsity.l1.target_l0",
                "mode: target needs the number of active neurons per token to steer to",
                f"set for example {max(1, model.ffn_hidden_size // 50)} (2 % of model.ffn_hidden_size)",
                None,
            )
        elif isinstance(l1.target_l0, tuple) and len(targets) != model.num_layers:
            yield Problem(
                "sparsity.l1.target_l0",
                f"{len(targets)} targets for model.num_layers = {model.num_layers}",
                "give one number for all layers or one per layer",
                list(targets),
            )
        elif any(target is not None and target > model.ffn_hidden_size for target in targets):
            yield Problem(
                "sparsity.l1.target_l0",
                f"more active neurons than model.ffn_hidden_size = {model.ffn_hidden_size}",
                "set a count of neurons, not of tokens",
                l1.target_l0,
            )
    elif l1.decay_start_step is not None and l1.decay_start_step < l1.start_step + l1.warmup_steps:
        yield Problem(
            "sparsity.l1.decay_start_step",
            f"before the end of the warm-up at step {l1.start_step + l1.warmup_steps}",
            "set it later",
            l1.decay_start_step,
        )
    elif l1.decay_start_step is None and (l1.decay_steps or l1.decay_to):
        key = "decay_steps" if l1.decay_steps else "decay_to"
        yield Problem(
            f"sparsity.l1.{key}",
            "means nothing without sparsity.l1.decay_start_step",
            "say at which step the coefficient starts to fall, or leave it out",
            getattr(l1, key),
        )


RULES = (_recompute, _cuda_graphs, _fp8, _schedule, _l1)
