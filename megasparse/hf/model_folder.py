"""A model in Hugging Face format: its description, and its tensors under the stock architecture's names and shapes."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from megasparse.hf.config import SourceModel, read_hf_config
from megasparse.hf.errors import ConvertError
from megasparse.hf.published import AUXILIARY, other_names
from megasparse.hf.safetensors_files import WeightFiles
from megasparse.hf.tensors import Weight, hf_shapes, join, weights

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""One tensor where embeddings are tied."""


class ModelFolder:
    """An opened model whose tensors are all there, in the shapes that its config.json gives. Only reads.

    Args:
        folder: with config.json and weights.
        down_by_neuron: `down_proj` is stored [neurons, hidden]; None: as the files tell.

    Raises:
        ConvertError: the folder is no such model, is incomplete or damaged, or holds what this package cannot compute.
    """

    def __init__(self, folder: Path, down_by_neuron: bool | None = None) -> None:
        self.path = folder
        self.described: SourceModel = read_hf_config(folder)
        self._files = WeightFiles(folder)
        model = self.described.model
        self.weights: list[Weight] = weights(model, self.described.architecture, _padded(self.described))
        """All weights of the model; vocabularies padded as a checkpoint stores them."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name -> shape of all tensors that make them up."""
        assert model.vocab_size is not None
        for weight in self.weights:
            self.shapes.update(zip(weight.names, hf_shapes(weight, model, model.vocab_size), strict=True))
        self._stored = self._find(down_by_neuron)
        self._check_shapes()
        stored = {name for name, _ in self._stored.values()}
        for name in self._files.files:
            if name not in stored:
                self._accept_extra(name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as stored; where they differ, the one that holds all of them exactly."""
        found = {self._files.dtype(stored) for stored, _ in self._stored.values()}
        return found.pop() if len(found) == 1 else torch.float32

    def tensor(self, name: str) -> Tensor:
        """A tensor as the stock architecture has it, in the type of the file. `name`: a key of `shapes`."""
        stored, transposed = self._stored[name]
        tensor = self._files.read(stored)
        return tensor.t().contiguous() if transposed else tensor

    def read(self, weight: Weight) -> Tensor:
        """The Megatron tensor of a weight, in the type of the file."""
        return join(weight, [self.tensor(name) for name in weight.names], self.described.model)

    def close(self) -> None:
        self._files.close()

    def _find(self, down_by_neuron: bool | None) -> dict[str, tuple[str, bool]]:
        """Name of each tensor -> its name in the files, and whether it is transposed there."""
        files, found = self._files.files, {}
        for name in self.shapes:
            found[name] = (name, False)
            if name not in files and self.described.published:
                others = other_names(name, self.described.model.gated)
                found[name] = next((other for other in others if other[0] in files), found[name])
        if EMBEDDING not in files and OUTPUT in files and self.described.model.tie_embeddings:
            found[EMBEDDING] = (OUTPUT, False)  # who saves shared tensors once may choose either name
        missing = [name for name, (stored, _) in found.items() if stored not in files]
        if missing:
            count = "a tensor is missing:" if len(missing) == 1 else f"{len(missing)} tensors are missing, the first is"
            raise ConvertError(
                f"{self.path}: {count} {missing[0]}; its config.json and its weights are not of one model, or a file "
                "was not downloaded"
            )
        standard = [name for name, (stored, _) in found.items() if stored.endswith(".mlp.down_proj.weight")]
        if standard and self._by_neuron(standard[0], down_by_neuron):
            found.update({name: (name, True) for name in standard})
        return found

    def _by_neuron(self, name: str, asked: bool | None) -> bool:
        """Whether the `down_proj` weights, of which `name` is one, are stored [neurons, hidden]."""
        model = self.described.model
        known = self.described.down_by_neuron if asked is None else asked
        if known is not None:
            return known
        if model.hidden_size == model.ffn_hidden_size:
            raise ConvertError(
                f"{self.path}: down_proj is square and was trained with sparsity_use_hybrid_kernel, so nothing tells "
                "whether it is stored transposed; say --down-proj by-neuron or --down-proj standard"
            )
        return self._files.shape(name) == (model.ffn_hidden_size, model.hidden_size)

    def _check_shapes(self) -> None:
        for name, expected in self.shapes.items():
            stored, transposed = self._stored[name]
            self._files.dtype(stored)
            found = self._files.shape(stored)
            if (found[::-1] if transposed else found) != expected:
                raise ConvertError(
                    f"{self._file(stored)}: {stored} is {list(found)}, and config.json says "
                    f"{list(expected[::-1] if transposed else expected)}; they are not of one model"
                )

    def _accept_extra(self, name: str) -> None:
        """A tensor that the model here does not have: fine only where it changes nothing."""
        described = self.described
        if AUXILIARY.search(name) or (described.activation != "relu" and ".mlp.act_fn." in name):
            return
        if name == OUTPUT and described.model.tie_embeddings:
            if not torch.equal(self._files.read(name), self._files.read(EMBEDDING)):
                raise ConvertError(
                    f"{self._file(name)}: lm_head.weight differs from the embedding, and config.json ties them; set "
                    "tie_word_embeddings to false there if the model was trained so"
                )
            return
        zero = (described.output_bias and name.endswith(".self_attn.o_proj.bias")) or (
            described.mlp_bias and re.search(r"\.mlp\.(gate|up|down)_proj\.bias$", name)
        )
        if zero:
            if bool(self._files.read(name).any()):
                raise ConvertError(f"{self._file(name)}: {name} is not zero; models with this bias are not supported")
            return
        raise ConvertError(
            f"{self._file(name)}: holds {name}, which a {described.architecture.class_name} of its config.json does "
            "not have; it is another architecture, or an adapter that must be merged first"
        )

    def _file(self, stored: str) -> Path:
        return self.path / self._files.files[stored]


def _padded(described: SourceModel) -> int:
    """Rows of the embedding as stored; loading at a larger tensor parallelism pads further."""
    assert described.model.vocab_size is not None
    multiple = described.model.make_vocab_size_divisible_by
    return -(-described.model.vocab_size // multiple) * multiple
