"""What the training tests run: tiny configurations, small data, and an observer that records what happened."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megasparse.training.callbacks import Callback, Metrics, TrainState

VOCABULARY = 60
END = 0
"""The end-of-document token of the data below; `write_tokenizer` makes a tokenizer that says so."""


def write_data(prefix: Path, documents: int, seed: int) -> str:
    """A Megatron data set of short documents with a pattern that a small model learns. Returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        tokens = [int(rng.integers(1, VOCABULARY))]
        for _ in range(int(rng.integers(5, 60))):
            tokens.append(int((tokens[-1] * 3 + rng.integers(0, 3)) % (VOCABULARY - 1) + 1))
        builder.add_document(torch.tensor([*tokens, END]), [len(tokens) + 1])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_tokenizer(path: Path) -> str:
    """A tokenizer.json of VOCABULARY words whose token END is <|endoftext|>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<|endoftext|>": END} | {f"w{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="w1")).save(str(path))
    return str(path)


def configuration(run: Path, blend: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny run as a nested dict; `sections` are merged into it, one level deep."""
    result: dict[str, Any] = {
        "run": {"name": run.name, "directory": str(run)},
        "model": {
            "num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
            "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 16,
        },
        "sparsity": {},
        "parallel": {},
        "data": {"blend": blend, "sequence_length": 16, "num_workers": 0, "split": "90,10,0"},
        "training": {
            "micro_batch_size": 1, "global_batch_size": 4, "steps": 20, "precision": "fp32", "eval_steps": 0,
        },
        "optimizer": {"lr": 3e-3, "schedule": {"kind": "cosine", "warmup_steps": 4}},
        "checkpoint": {"interval": 0},
        "logging": {"jsonl": False, "report": False, "console": False},
    }  # fmt: skip
    for name, values in sections.items():
        result[name] = {**result[name], **values}
    return result


class Recorder(Callback):
    """Keeps the metrics of every step, validation results, checkpoints, and a digest of the model at the end."""

    def __init__(self) -> None:
        self.steps: dict[int, Metrics] = {}
        self.evaluations: dict[int, Metrics] = {}
        self.saved: list[str] = []
        self.resumed_from: str | None = None
        self.digest = ""

    def on_start(self, state: TrainState) -> None:
        self.resumed_from = str(state.resumed_from) if state.resumed_from else None

    def on_step_end(self, state: TrainState, metrics: Metrics) -> None:
        self.steps[state.step] = dict(metrics)

    def on_eval(self, state: TrainState, metrics: Metrics) -> None:
        self.evaluations[state.step] = dict(metrics)

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        self.saved.append(path.name)

    def on_end(self, state: TrainState) -> None:
        digest = hashlib.sha256()
        for chunk in state.model:
            for name, value in sorted(chunk.named_parameters()):
                digest.update(name.encode())
                digest.update(value.detach().float().numpy().tobytes())
        for mlp in state.mlps:
            digest.update(mlp.recorder.steps_since_fired.numpy().tobytes())
        self.digest = digest.hexdigest()

    def record(self, code: int) -> dict[str, Any]:
        """What a test looks at, as plain values."""
        return {
            "code": code,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "saved": self.saved,
            "resumed_from": self.resumed_from,
            "digest": self.digest,
        }


DEAD_NEURONS = (3, 20)


class DeadNeurons(Callback):
    """Starts a run with DEAD_NEURONS dead in every layer: a gate row of zeros never fires and gets no gradient."""

    @torch.no_grad()
    def on_start(self, state: TrainState) -> None:
        from megatron.core import parallel_state

        if state.step > 0:
            return
        for mlp in state.mlps:
            first = parallel_state.get_tensor_model_parallel_rank() * mlp.hidden
            for neuron in DEAD_NEURONS:
                if first <= neuron < first + mlp.hidden:
                    mlp.linear_fc1.weight[neuron - first].zero_()


def train_all(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains one configuration after the other on the ranks that call this; records of this rank."""
    from megasparse.config import parse_config
    from megasparse.training.loop import pretrain

    results = []
    for data in configurations:
        recorder = Recorder()
        cfg = parse_config(data)
        code = pretrain(cfg, [DeadNeurons(), recorder] if cfg.sparsity.reinit.every else [recorder])
        results.append(recorder.record(code))
    return results
