"""Models and tokenizers of the Hugging Face hub, downloaded, so that all who read them read the same folder.

By name, transformers makes of most tokenizers one of its own classes (`megasparse/hf/tokenizer_reading.py`), and asks
for most of a minute, again and again, where there is no network. Imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

_BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")
"""A repository's files beside the weights, the tokenizer's among them."""


class HubError(Exception):
    """Nothing of this name is here or can be had from the hub; the message says why and what to do."""


def local_tokenizer(name: str) -> Path:
    """The path as it is, or the folder to which a tokenizer of the hub was downloaded. Raises HubError."""
    return _local(name, "tokenizer")


def local_model(name: str) -> Path:
    """The same of a model with its tokenizer; pickled weights only where there are no others. Raises HubError."""
    folder = _local(name, "model", "*.safetensors")
    return folder if any(folder.glob("*.safetensors")) else _local(name, "model", "pytorch_model*.bin")


def _local(name: str, what: str, *weights: str) -> Path:
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        # "consolidated": the same weights once more, in their authors' own format.
        folder = snapshot_download(name, allow_patterns=[*_BESIDE_WEIGHTS, *weights], ignore_patterns="consolidated*")
    except Exception as error:  # the hub's client and its HTTP library raise many types
        reason = " ".join(str(error).split())[:500]  # it says on a later line that a model is gated
        raise HubError(
            f"{name}: neither a {what} here nor one that could be downloaded from the Hugging Face hub ({reason}); "
            f"check the name and the network, and for a private or gated {what} run `hf auth login`"
        ) from None
    return Path(folder)
