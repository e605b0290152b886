"""Upload of an exported model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from megasparse.hf.errors import ConvertError


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to `name` ("user/model"), creating the repository where there is none. Returns its address.

    Uses the token of `hf auth login` or HF_TOKEN. An upload that was interrupted sends only what is missing when it is
    repeated. Raises ConvertError where the hub refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    except Exception as error:  # the hub's client and its HTTP library raise many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConvertError(
            f"{folder} is complete, but the upload to {name} failed ({reason}); check the name and the token (hf "
            "auth login), "
            f"then: hf upload {name} {folder}"
        ) from None
    return str(commit.commit_url)
