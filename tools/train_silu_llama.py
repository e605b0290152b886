"""Trains a small dense Llama (SiLU) with transformers alone: a model to sparsify (tools/sparsify.sh).

    python tools/train_silu_llama.py runs/sparsify/data/text runs/sparsify/data/text-tokenizer runs/sparsify/dense

Windows of 128 tokens from the first 96 % of the documents (data.split "96,4,0"), batches of 8, AdamW, cosine decay.
"""

from __future__ import annotations

import argparse
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, WARMUP, TRAIN_SHARE = 128, 8, 30, 0.96

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=LENGTH, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prefix that megasparse preprocess has written")
    parser.add_argument("tokenizer", type=Path, help="its tokenizer, a folder")
    parser.add_argument("output", type=Path, help="folder for the model")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate (%(default)s)")
    parser.add_argument("--start", type=Path, help="a model to go on from")
    args = parser.parse_args()

    tokens = training_tokens(args.data)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(args.start) if args.start else LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    generator = np.random.default_rng(0)
    for step in range(1, args.steps + 1):
        starts = generator.integers(0, len(tokens) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([tokens[start : start + LENGTH] for start in starts]).astype(np.int64))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(args.output)
    shutil.copytree(args.tokenizer, args.output, dirs_exist_ok=True)


def training_tokens(prefix: str) -> np.ndarray:
    """uint16 [tokens] of the documents for training."""
    warnings.filterwarnings("ignore", module=r"megatron\.")  # of optional packages that training alone uses
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(prefix)  # kept while its lengths are read: it unmaps the file when it goes
    lengths = documents.sequence_lengths
    count = int(lengths[: round(TRAIN_SHARE * len(lengths))].sum())
    return np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")[:count]


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, cosine decay to a twentieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


if __name__ == "__main__":
    main()
