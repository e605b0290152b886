"""Rules that involve more than one key. All of them run, so that all problems are reported together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.schema import Config

Rule = Callable[[Config], Iterator[Problem]]


def _near_multiple(value: int, multiple: int) -> int:
    return max(1, round(value / multiple)) * multiple


def _attention(cfg: Config) -> Iterator[Problem]:
    model, tensor = cfg.model, cfg.parallel.tensor
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield Problem(
            "model.hidden_size",
            f"not a multiple of model.num_attention_heads = {heads}",
            f"set {_near_multiple(model.hidden_size, heads)}, or set model.kv_channels",
            model.hidden_size,
        )
    if heads % groups:
        yield Problem(
            "model.num_query_groups",
            f"does not divide model.num_attention_heads = {heads}",
            "set a divisor of the number of heads",
            groups,
        )
    if model.head_width % 2:
        yield Problem(
            "model.kv_channels",
            "rotary embeddings need an even head width",
            "set an even width",
            model.head_width,
        )
    if heads % tensor:
        yield Problem(
            "parallel.tensor",
            f"does not divide model.num_attention_heads = {heads}",
            "set a divisor of the number of heads",
            tensor,
        )
    elif groups % tensor:
        yield Problem(
            "parallel.tensor",
            f"does not divide model.num_query_groups = {groups}",
            "set a divisor of the number of query groups",
            tensor,
        )


def _feed_forward(cfg: Config) -> Iterator[Problem]:
    width, tensor = cfg.model.ffn_hidden_size, cfg.parallel.tensor
    if width % tensor:
        yield Problem(
            "model.ffn_hidden_size",
            f"not a multiple of parallel.tensor = {tensor}",
            f"set {_near_multiple(width, tensor)}",
            width,
        )


def _rope(cfg: Config) -> Iterator[Problem]:
    scaling = cfg.model.rope_scaling
    if scaling and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield Problem(
            "model.rope_scaling.high_freq_factor",
            f"not above low_freq_factor = {scaling.low_freq_factor}",
            "Llama 3.1 has 4.0 and 1.0",
            scaling.high_freq_factor,
        )


def _pipeline(cfg: Config) -> Iterator[Problem]:
    parallel, layers = cfg.parallel, cfg.model.num_layers
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if (parallel.virtual_pipeline or 1) > 1 and parallel.pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline",
            "model chunks are interleaved between stages, and parallel.pipeline is 1",
            "set parallel.pipeline > 1 or leave virtual_pipeline out",
            parallel.virtual_pipeline,
        )
    elif layers % chunks:
        product = f"{parallel.pipeline} x {parallel.virtual_pipeline or 1} = {chunks}"
        yield Problem(
            "model.num_layers",
            f"not a multiple of parallel.pipeline x virtual_pipeline = {product}",
            f"set {_near_multiple(layers, chunks)} layers or other pipeline sizes",
            layers,
        )


def _sequence(cfg: Config) -> Iterator[Problem]:
    parallel, length = cfg.parallel, cfg.data.sequence_length
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield Problem(
            "parallel.sequence_parallel",
            "shards activations over the tensor-parallel ranks, and parallel.tensor is 1",
            "set parallel.tensor > 1 or sequence_parallel: false",
            True,
        )
    share = 2 * parallel.context if parallel.context > 1 else 1
    if length % share:
        yield Problem(
            "data.sequence_length",
            f"context parallelism gives each of {parallel.context} ranks two chunks: not a multiple of {share}",
            f"set {_near_multiple(length, share)}",
            length,
        )
    elif parallel.sequence_parallel and (length // parallel.context) % parallel.tensor:
        product = parallel.context * parallel.tensor
        yield Problem(
            "data.sequence_length",
            "sequence parallelism needs sequence_length / parallel.context to be a "
            f"multiple of parallel.tensor = {parallel.tensor}",
            f"set a multiple of {product}",
            length,
        )
    limit = cfg.model.max_position_embeddings
    if limit is not None and length > limit:
        yield Problem(
            "data.sequence_length",
            f"longer than model.max_position_embeddings = {limit}",
            f"set at most {limit} or raise max_position_embeddings",
            length,
        )


def _documents(cfg: Config) -> Iterator[Problem]:
    if cfg.data.reset_attention_mask and cfg.parallel.context > 1:
        yield Problem(
            "data.reset_attention_mask",
            "not available with context parallelism",
            "set parallel.context: 1 or reset_attention_mask: false",
            True,
        )


def _overlap(cfg: Config) -> Iterator[Problem]:
    parallel = cfg.parallel
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield Problem(
            "parallel.overlap_param_gather",
            "only the distributed optimizer gathers parameters",
            "set parallel.distributed_optimizer: true",
            True,
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Problem(
            "parallel.overlap_param_gather",
            "needs the gradient reduction overlapped too",
            "set parallel.overlap_grad_reduce: true",
            True,
        )


def _recompute(cfg: Config) -> Iterator[Problem]:
    training = cfg.training
    if training.recompute_layers is None:
        return
    chunk = cfg.model.num_layers // (cfg.parallel.pipeline * (cfg.parallel.virtual_pipeline or 1))
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
    if training.fp8 != "off":
        rule = "the host keeps Transformer Engine's scales between steps, and graphs hold kernels alone"
        yield Problem("training.cuda_graphs", rule, f"set training.fp8: off, or {rest}", True)
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
            f"set {_near_multiple(model.hidden_size, multiple)}, or training.fp8: off",
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


def _data(cfg: Config) -> Iterator[Problem]:
    data = cfg.data
    if data.blend and (data.train or data.valid or data.test):
        yield Problem(
            "data.blend",
            "given beside data.train/valid/test",
            "use blend with split, or train, valid and test, not both",
        )
    elif not data.train and (data.valid or data.test):
        yield Problem("data.train", "missing beside data.valid/test", "give a blend for training", None)
    try:
        weights = data.split_weights
    except ValueError:
        yield Problem("data.split", "not three numbers >= 0 separated by commas", 'for example "969,30,1"', data.split)
    else:
        if data.blend and weights[0] == 0:
            yield Problem("data.split", "leaves nothing for training", 'for example "969,30,1"', data.split)


def _tokenizer(cfg: Config) -> Iterator[Problem]:
    from megasparse.config.vocab import tokenizer_vocab_size

    if cfg.model.vocab_size is None or not cfg.data.tokenizer or not os.path.exists(cfg.data.tokenizer):
        return
    size = tokenizer_vocab_size(cfg.data.tokenizer)
    if size > cfg.model.vocab_size:
        yield Problem(
            "model.vocab_size",
            f"the tokenizer {cfg.data.tokenizer} has {size} tokens",
            f"set at least {size}, or leave it out",
            cfg.model.vocab_size,
        )


def _paths(cfg: Config) -> Iterator[Problem]:
    """`~` is the home folder at the start of a word of the shell alone, not in `key=~/folder` nor in a file."""
    for key, path in (
        ("run.directory", cfg.run.directory),
        ("data.cache_dir", cfg.data.cache_dir),
        ("data.tokenizer", cfg.data.tokenizer),
        ("checkpoint.directory", cfg.checkpoint.directory),
        ("checkpoint.load", cfg.checkpoint.load),
        ("logging.directory", cfg.logging.directory),
        *(("data", prefix) for prefix in cfg.data.prefixes),
    ):
        if path is not None and path.startswith("~"):
            yield Problem(
                key,
                "~ would be a folder of that name in the working directory",
                f"write {os.path.expanduser(path)}",
                path,
            )


def _evaluation(cfg: Config) -> Iterator[Problem]:
    if cfg.data.blend and cfg.training.eval_steps and _split_of(cfg)[1] == 0:
        yield Problem(
            "data.split",
            f"leaves nothing for validation while training.eval_steps is {cfg.training.eval_steps}",
            "give validation a share or set training.eval_steps: 0",
            cfg.data.split,
        )


def _split_of(cfg: Config) -> tuple[float, float, float]:
    try:
        return cfg.data.split_weights
    except ValueError:  # reported by _data
        return 1.0, 1.0, 1.0


RULES: tuple[Rule, ...] = (
    _attention,
    _feed_forward,
    _rope,
    _pipeline,
    _sequence,
    _documents,
    _overlap,
    _recompute,
    _cuda_graphs,
    _fp8,
    _schedule,
    _l1,
    _data,
    _tokenizer,
    _evaluation,
    _paths,
)


def _world(cfg: Config, world_size: int) -> Iterator[Problem]:
    try:
        micro_batches = cfg.num_microbatches(world_size)
    except ConfigError as error:
        yield from error.problems
        return
    parallel = cfg.parallel
    if (parallel.virtual_pipeline or 1) > 1 and micro_batches % parallel.pipeline:
        yield Problem(
            "training.global_batch_size",
            f"gives {micro_batches} micro-batches per step; the interleaved "
            f"schedule needs a multiple of parallel.pipeline = {parallel.pipeline}",
            "change global_batch_size or micro_batch_size, or leave virtual_pipeline out",
            cfg.training.global_batch_size,
        )


def find_problems(cfg: Config, world_size: int | None = None) -> list[Problem]:
    """All broken rules; with `world_size` (ranks of the job) those of the layout too."""
    problems = [problem for rule in RULES for problem in rule(cfg)]
    if world_size is not None:
        problems += _world(cfg, world_size)
    return problems
