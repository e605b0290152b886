"""Hugging Face format in and out: `convert_to_hf`, `convert_from_hf`; the command is `megasparse convert`."""
