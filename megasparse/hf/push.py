"""Upload of an exported model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from megasparse.hf.errors import ConvertError, first_line


def prepare_push(name: str, private: bool) -> str:
    """Make the repository `name` ("user/model", or "model" under the token's own name) where there is none.

    Done before a long export, so that a missing token or right shows at once. Uses the token of `hf auth login` or
    HF_TOKEN.

    Returns:
        the repository's full name.

    Raises:
        ConvertError: there is no token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConvertError(f"--push {name}: not the name of a repository ({error}); write it as user/model") from None
    if get_token() is None:
        raise ConvertError(f"--push {name}: no token for the hub; run `hf auth login`, or set HF_TOKEN")
    try:
        return str(HfApi().create_repo(name, private=private, exist_ok=True).repo_id)
    except Exception as error:  # the hub's client and its HTTP library raise many types
        raise ConvertError(
            f"--push {name}: the hub does not let the repository be written ({first_line(error)}); check the name, the "
            "token's rights (hf auth whoami) and the network, or leave out --push and upload later: hf upload"
        ) from None


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository `name`. Returns the address of the commit.

    An upload that was interrupted sends only what is missing when it is repeated. Raises ConvertError where the hub
    refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    except Exception as error:  # as above
        raise ConvertError(
            f"{folder} is complete, but the upload to {name} failed ({first_line(error)}); try again with: "
            f"hf upload {name} {folder}"
        ) from None
    return str(commit.commit_url)
