"""A random Llama in which every layer's gate fires as a recorded one, for `benchmark_inference.py`.

Time and energy of the sparse MLP depend on which neurons fire for which tokens, and random weights on random tokens do
not fire as trained ones do. So each layer gets gate rows, and the tokens inputs, for which a recorded pattern comes out
(`megasparse.mlp.synthetic.fit`); a layer takes the recorded one at the nearest relative depth. All else is an ordinary
random model that computes what it always computes: the norm in front of each MLP adds the recorded input to a 64th of
its own result, so that attention and earlier layers still reach every later one. That costs one more read and a
gather of a [M, D] tensor a layer, on the dense and on the sparse side alike (below 1 % of a layer).

What really fires is measured and reported by the benchmark, not assumed.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megasparse.mlp import synthetic

Layer = tuple[Tensor, Tensor]
"""Inputs [T, D] and gate rows [H, D] that go together."""


class RecordedInput(nn.Module):
    """A norm whose output for the i-th token of a call is the recorded input `rows[i]`, plus a 64th of the norm's."""

    rows: Tensor

    def __init__(self, norm: nn.Module, recorded: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("recorded", recorded, persistent=False)
        self.register_buffer("rows", torch.zeros(1, dtype=torch.int64, device=recorded.device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return torch.add(self.recorded[self.rows].view_as(normed), normed, alpha=1 / 64)


def random_llama(layers: int, width: int, hidden: int, heads: int, vocab: int, device: str) -> LlamaForCausalLM:
    """With tied embeddings; bf16 on CUDA, fp32 elsewhere."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=hidden, num_attention_heads=heads,
        vocab_size=vocab, tie_word_embeddings=True, hidden_act="relu", max_position_embeddings=4096,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def recorded_layers(folder: Path, tokens: int, width: int, hidden: int, device: str) -> dict[float, Layer]:
    """Fit every pattern of a directory, by relative depth: layer 5 of layers 0 to 7 is at 5/7."""
    files = {int(match[1]): path for path in folder.glob("*.npz") if (match := re.search(r"(\d+)$", path.stem))}
    if not files:
        raise SystemExit(f"error: {folder} has no recorded patterns (layerN.npz)")
    found = {}
    for number, path in sorted(files.items()):
        pattern = synthetic.load_pattern(path, hidden)[:tokens]
        if pattern.shape[1] < hidden:
            raise SystemExit(f"error: {path} has {pattern.shape[1]} neurons, fewer than --shape's {hidden}")
        generator = torch.Generator(device).manual_seed(number)
        found[number / max(max(files), 1)] = synthetic.fit(pattern, width, generator)
    return found


def uniform_layer(l0: float, tokens: int, width: int, hidden: int, device: str) -> dict[float, Layer]:
    """Neurons that fire independently, l0 of them a token."""
    generator = torch.Generator(device).manual_seed(0)
    return {0.0: synthetic.uniform(tokens, width, hidden, l0, generator)}


def plant(model: LlamaForCausalLM, recorded: dict[float, Layer]) -> list[float]:
    """Put inputs and gate rows into the model's layers. Returns the depth that each layer took."""
    layers = model.model.layers
    dtype = model.dtype
    tables = {depth: inputs.to(dtype) for depth, (inputs, _) in recorded.items()}
    taken = []
    for index, layer in enumerate(layers):
        depth = min(recorded, key=lambda d: abs(d - index / max(len(layers) - 1, 1)))
        with torch.no_grad():
            layer.mlp.gate_proj.weight.copy_(recorded[depth][1])
        layer.post_attention_layernorm = RecordedInput(layer.post_attention_layernorm, tables[depth])
        taken.append(depth)
    return taken


def set_rows(model: nn.Module, rows: Tensor) -> None:
    """Which recorded token each token of a call is: int64 [M], one tensor for all layers."""
    for module in model.modules():
        if isinstance(module, RecordedInput):
            module.rows = rows
