"""The typed configuration: every key, its type, its default and its unit.

Models are frozen and refuse unknown keys and implicit type conversion (`"2"` is not 2). What involves more
than one key is checked in `rules.py`. Paths are relative to the working directory of the run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt

from megasparse.config.errors import ConfigError, Problem

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_blend(value: Any) -> Any:
    """`prefix` | `[prefix, ...]` | `[[weight, prefix], ...]` -> `((weight, prefix), ...)`."""
    if isinstance(value, str):
        return ((1.0, value),)
    if isinstance(value, list | tuple):
        return tuple((1.0, item) if isinstance(item, str) else _as_tuple(item) for item in value)
    return value


Blend = Annotated[tuple[tuple[PositiveFloat, str], ...], Field(min_length=1), BeforeValidator(_as_blend)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


class RopeScaling(Section):
    """Frequency scaling of rotary embeddings as in Llama 3.1 (`rope_scaling` of its Hugging Face config)."""

    type: Literal["llama3"] = "llama3"
    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192


class ModelConfig(Section):
    """Decoder-only transformer with sparse feed-forward layers. Sizes are of the whole model."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    """Neurons of the feed-forward layer (width of the gate), before division by tensor parallelism."""
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    """Key/value heads of grouped-query attention; None: as many as attention heads."""
    kv_channels: PositiveInt | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""
    gated: bool = True
    """True: h = relu(x Wg) * (x Wu). False: h = relu(x Wu)."""
    vocab_size: PositiveInt | None = None
    """Tokens before padding; None: the size of `data.tokenizer`."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence the model is declared for; None: data.sequence_length."""
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: PositiveFloat = 1e-5
    rotary_base: PositiveFloat = 1e4
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    init_std: PositiveFloat = 0.02
    scale_output_init: bool = True
    """Divide init_std of the projections that write to the residual stream by sqrt(2 * num_layers)."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    implementation: Literal["auto", "local", "te"] = "auto"
    """Attention, norm, projections: Transformer Engine's or ours; auto: TE's where it is installed."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


class L1Config(Section):
    """L1 term on the hidden activations: coeff * mean over layers of mean over tokens of sum_n |h_n|.

    `constant` is the paper's (arXiv 2603.23198): one coefficient for all layers. `target` steers one
    coefficient per layer until the layer's L0 (active neurons per token) meets `target_l0`.
    """

    mode: Literal["off", "constant", "target"] = "off"
    coeff: PositiveFloat = 2e-5
    """constant: the coefficient. target: where every layer's coefficient starts; it stays within a twentieth and a
    hundredfold of it."""
    start_step: NonNegativeInt = 0
    """First step with the term on."""
    warmup_steps: NonNegativeInt = 0
    """constant: steps from 0 to coeff, linear, from start_step on."""
    decay_start_step: NonNegativeInt | None = None
    """constant: step at which the coefficient starts to fall linearly; None: never."""
    decay_steps: NonNegativeInt = 0
    """constant: steps that the fall takes."""
    decay_to: NonNegativeFloat = 0.0
    """constant: coefficient at the end of the fall."""
    target_l0: PositiveFloat | Annotated[tuple[PositiveFloat, ...], BeforeValidator(_as_tuple)] | None = None
    """target: active neurons per token, one number for all layers or one per layer."""
    gain: PositiveFloat = 0.03
    """target: log coeff += gain * clip(e, -1, 1) every step, e the log(L0 / target) expected some steps ahead
    (training/l1.py)."""


class ReinitConfig(Section):
    """Dead neurons get new gate rows (up rows where not gated) that fire as often as the layer's average neuron, and
    zero Adam moments (training/dead_neurons.py)."""

    every: NonNegativeInt = 0
    """Steps between re-initialisations; 0: off."""
    until_fraction: Fraction = 0.95
    """Stop after this fraction of training.steps."""
    std: PositiveFloat | None = None
    """Standard deviation of the new rows, but for their bias against the mean input; None: model.init_std."""


class SparsityConfig(Section):
    path: Literal["auto", "dense", "sparse"] = "auto"
    """auto: each layer runs what is faster at its measured sparsity; both paths compute the same."""
    route_interval: PositiveInt = 50
    """auto: steps between decisions."""
    l1: L1Config = L1Config()
    reinit: ReinitConfig = ReinitConfig()
    dead_window_steps: PositiveInt = 50
    """A neuron that fired for no counted token in this many steps is dead."""


class ParallelConfig(Section):
    """How the model is laid out over the GPUs; what is left over is data parallelism."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt | None = None
    """Model chunks per pipeline stage (interleaved 1F1B); None: one, not interleaved."""
    context: PositiveInt = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    """Shard fp32 master weights and Adam moments over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32 also where the weights are bf16."""
    timeout_minutes: PositiveFloat = 10.0
    """A collective that takes longer ends the run, naming the rank."""

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def chunks(self) -> int:
        """Model chunks of a pipeline stage; more than one are interleaved."""
        return self.virtual_pipeline or 1

    def data_parallel_size(self, world_size: int) -> int:
        if world_size < 1 or world_size % self.model_size:
            raise ConfigError(
                [
                    Problem(
                        "parallel",
                        f"the world of {world_size} ranks is not a multiple of tensor x pipeline x context = "
                        f"{self.tensor} x {self.pipeline} x {self.context} = {self.model_size}",
                        f"start a multiple of {self.model_size} ranks or change the parallel sizes",
                    )
                ]
            )
        return world_size // self.model_size


BLENDS = ("blend", "train", "valid", "test")
"""Keys of `data` that name data sets."""


class DataConfig(Section):
    """Data sets are prefixes of Megatron `.bin`/`.idx` pairs, as `megasparse preprocess` writes them."""

    blend: Blend | None = None
    """`prefix` or `[[weight, prefix], ...]`, divided by `split` into train, valid and test."""
    split: str = "969,30,1"
    """Parts of `blend` for train, valid, test; any scale."""
    train: Blend | None = None
    valid: Blend | None = None
    test: Blend | None = None
    """Instead of blend + split: one blend for each. What is for test is kept out of the run; no command reads it."""
    tokenizer: str | None = None
    """A tokenizer.json or a Hugging Face tokenizer directory."""
    sequence_length: PositiveInt = 2048
    """Tokens per sample."""
    reset_attention_mask: bool = False
    """Tokens do not attend over the end of a document. Core attention is then PyTorch's under Transformer Engine too,
    whose own is causal alone."""
    eod_mask_loss: bool = False
    """What follows an end-of-document token, the start of another document, counts in no loss."""
    num_workers: NonNegativeInt = 2
    """Loader processes per rank; 0: load in the training process."""
    allow_change: bool = False
    """Resume although data, blend or their order differ from the checkpoint's: some samples may repeat, others be left
    out. The position in the data stays."""
    cache_dir: str | None = None
    """Where the sample indices are kept; None: <run directory>/cache."""

    @property
    def split_weights(self) -> tuple[float, float, float]:
        """`split` as three fractions of sum one. Raises ValueError where it is not three numbers >= 0, in plain digits:
        Megatron makes two numbers of 1e3."""
        texts = self.split.split(",")
        if not all(re.fullmatch(r"\s*\+?[.0-9]+\s*", text) for text in texts):
            raise ValueError(self.split)
        parts = [float(text) for text in texts]
        if len(parts) != 3 or sum(parts) <= 0:
            raise ValueError(self.split)
        return parts[0] / sum(parts), parts[1] / sum(parts), parts[2] / sum(parts)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Every prefix that any split names, in order, without repeats."""
        return tuple(dict.fromkeys(prefix for blend in self.blends.values() for _, prefix in blend))

    @property
    def blends(self) -> dict[str, Blend]:
        """Those that are given, by key."""
        return {key: blend for key in BLENDS if (blend := getattr(self, key))}


Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]


class TrainingConfig(Section):
    micro_batch_size: PositiveInt = 1
    """Sequences per rank and forward pass."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step over the whole job."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    precision: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["off", "hybrid", "e4m3"] = "off"
    """Attention projections in 8 bits, by Transformer Engine; the sparse MLP and all the rest stay in bf16. hybrid:
    e4m3 forward, e5m2 for gradients; e4m3: for both."""
    fp8_recipe: Fp8Recipe = "delayed"
    """How a tensor is scaled to 8 bits. delayed: by the largest value of the step before; tensorwise: by its own;
    blockwise: one scale for every 128 values of activations, every 128 x 128 of weights (CUDA 12.9 or newer)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: nothing, `recompute_modules`, or whole layers."""
    recompute_layers: PositiveInt | None = None
    """full: layers per pipeline chunk that are recomputed; None: all."""
    recompute_modules: Annotated[
        tuple[Literal["core_attn", "layernorm", "mlp"], ...], Field(min_length=1), BeforeValidator(_as_tuple)
    ] = ("core_attn",)
    """selective: what is recomputed."""
    cuda_graphs: bool = False
    """The attention part of every layer as CUDA graphs: one launch in place of dozens, for GPUs that wait for their
    host: small micro-batches, layers cut by tensor or context parallelism."""
    eval_interval: NonNegativeInt = 500
    """Steps between validations; 0: only at the end."""
    eval_steps: NonNegativeInt = 10
    """Global batches per validation; 0: no validation. The run says it where they are more than is held out."""
    time_limit_minutes: PositiveFloat | None = None
    """Save and stop in good order before the process has run for this long."""
    deterministic: bool = False
    """Deterministic algorithms alone, of torch, cuBLAS and Transformer Engine; an error where there is none."""


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then `kind`."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    """cosine, linear: step that reaches min_lr (None: training.steps). wsd: length of the last decay."""
    wsd_decay: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """wsd: shape of the final decay."""


class OptimizerConfig(Section):
    """AdamW."""

    lr: PositiveFloat = 3e-4
    min_lr: NonNegativeFloat = 0.0
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        BeforeValidator(_as_tuple),
    ] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    weight_decay_exclude: Annotated[tuple[Literal["norm", "bias", "embedding"], ...], BeforeValidator(_as_tuple)] = (
        "norm",
        "bias",
    )
    clip_grad: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    schedule: ScheduleConfig = ScheduleConfig()


class CheckpointConfig(Section):
    directory: str | None = None
    """None: <run directory>/checkpoints."""
    interval: NonNegativeInt = 1000
    """Steps between checkpoints; 0: only at the end and when told to stop."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps divisible by this are kept for ever."""
    async_save: bool = False
    """Write in the background while training goes on."""
    load: str | None = None
    """A checkpoint or run directory to start from, where there is nothing to resume."""
    load_scope: Literal["weights", "full"] = "weights"
    """What is taken from `load`: the weights, or everything (optimizer, step, data position, RNG)."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Where `directory` holds a checkpoint: auto, must: go on from it; never: fail. must: fail if none."""


class WandbConfig(Section):
    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "megasparse"
    entity: str | None = None
    name: str | None = None
    """None: run.name."""
    tags: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()


class LoggingConfig(Section):
    interval: PositiveInt = 10
    """Steps between records."""
    memory_interval: PositiveInt = 100
    """Steps between samples of the bytes each layer saves for its backward."""
    directory: str | None = None
    """metrics.jsonl, report.html and the W&B folder; None: the run directory."""
    console: bool = True
    jsonl: bool = True
    report: bool = True
    """Write report.html at the end."""
    wandb: WandbConfig = WandbConfig()


class RunConfig(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Letters, digits, `.`, `_`, `-`. load_config sets it to the file's stem where it is not given."""
    directory: str | None = None
    """None: runs/<name>."""


class Config(Section):
    """A whole run. `load_config` reads one from YAML; `parse_config` makes one from a dict."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    sparsity: SparsityConfig = SparsityConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory or f"runs/{self.run.name}")

    @property
    def checkpoint_directory(self) -> Path:
        return Path(self.checkpoint.directory) if self.checkpoint.directory else self.run_directory / "checkpoints"

    @property
    def logging_directory(self) -> Path:
        return Path(self.logging.directory) if self.logging.directory else self.run_directory

    @property
    def cache_directory(self) -> Path:
        """Of this node: variables in it are expanded where it is asked for."""
        return Path(os.path.expandvars(self.data.cache_dir or self.run_directory / "cache"))

    @property
    def max_position_embeddings(self) -> int:
        return self.model.max_position_embeddings or self.data.sequence_length

    @property
    def chunk_layers(self) -> int:
        """Layers of a model chunk."""
        return self.model.num_layers // (self.parallel.pipeline * self.parallel.chunks)

    @property
    def vocab_size(self) -> int:
        """Tokens before padding. Raises ConfigError where it was not given and no tokenizer could be read."""
        if self.model.vocab_size is None:
            raise ConfigError(
                [
                    Problem(
                        "model.vocab_size",
                        "unknown: neither it nor a readable data.tokenizer is given",
                        "set data.tokenizer to the tokenizer of your data, or model.vocab_size",
                    )
                ]
            )
        return self.model.vocab_size

    def padded_vocab_size(self, tensor: int | None = None) -> int:
        """Rows of the embedding. `tensor`: tensor-parallel size, None: the configured one."""
        multiple = self.model.make_vocab_size_divisible_by * (tensor or self.parallel.tensor)
        return -(-self.vocab_size // multiple) * multiple

    def num_microbatches(self, world_size: int) -> int:
        """Forward passes per rank and step. Raises ConfigError where the batch does not divide."""
        data_parallel = self.parallel.data_parallel_size(world_size)
        per_pass = self.training.micro_batch_size * data_parallel
        if self.training.global_batch_size % per_pass:
            raise ConfigError(
                [
                    Problem(
                        "training.global_batch_size",
                        f"not a multiple of micro_batch_size x data-parallel size = "
                        f"{self.training.micro_batch_size} x {data_parallel} = {per_pass}",
                        f"set a multiple of {per_pass}, for example "
                        f"{max(1, round(self.training.global_batch_size / per_pass)) * per_pass}",
                        self.training.global_batch_size,
                    )
                ]
            )
        return self.training.global_batch_size // per_pass

    def validate(self, world_size: int) -> None:  # type: ignore[override]
        """Check every rule, those of the layout too. Raises ConfigError. Starts no process group."""
        from megasparse.config.rules import find_problems

        problems = find_problems(self, world_size)
        if problems:
            raise ConfigError(problems)
