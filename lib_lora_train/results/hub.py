"""A finished LoRA on the Hugging Face hub, by the library that the WebUI has, `huggingface_hub`, with its own login: no token
is asked for, kept or shown here."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib_lora_train.errors import HostError, LoraTrainError, OutputError, SettingError, translated
from lib_lora_train.results.shared_texts import readme
from lib_lora_train.results.sharing import SharedLora

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def check_push(repository: str, license_name: str) -> None:
    """Raise SettingError for what is no repository or no license of the hub, HostError where this machine has no login."""
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise HostError("The Hugging Face hub needs the Python package huggingface_hub", why=str(error),
                        remedy="install it with: pip install huggingface_hub") from error

    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise SettingError(f"{repository!r} is no repository of the hub", remedy="write it as user/name")
    if license_name and not re.fullmatch(r"[a-z0-9.+-]+", license_name):
        raise SettingError(f"{license_name!r} is no license of the hub", remedy="write its short name, as cc-by-nc-4.0")
    if not get_token():
        raise HostError("This machine has no login for the Hugging Face hub",
                        remedy="run `huggingface-cli login`, or set HF_TOKEN, with a token that may write")


def push(shared: SharedLora, repository: str, *, private: bool, license_name: str = "", overwrite: bool = False,
         scratch: Path | None = None) -> str:
    """Push the LoRA, its images and a README as one commit to `repository` ("user/name"), which is made where it is missing;
    returns its address. With `overwrite` also into one that holds files. `scratch` is where the files are put together.

    Raises SettingError for what is no repository, OutputError where it holds files or the hub or the disk refuses, HostError
    where there is no login or the hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_push(repository, license_name)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    with translated("putting the files together"), tempfile.TemporaryDirectory(dir=scratch, prefix="hub-") as made:
        shared.write(Path(made))
        files = {"README.md": readme(shared, license_name=license_name).encode(),
                 **{f"images/{path.name}": path for path in sorted(Path(made).glob("*.png"))},
                 f"{shared.name}.safetensors": Path(made) / f"{shared.name}.safetensors"}
        with _told(repository):
            url = api.create_repo(repository, private=private, exist_ok=True)
            if private and not api.repo_info(url.repo_id).private:
                raise OutputError(f"The repository {url.repo_id} is there already and is public",
                                  remedy="make it private on the hub, choose another name, or push it publicly")
            if not overwrite and set(api.list_repo_files(url.repo_id)) - {".gitattributes"}:
                raise OutputError(f"The repository {url.repo_id} holds files already",
                                  remedy="choose another name, or allow it to be overwritten")
            api.create_commit(url.repo_id, [CommitOperationAdd(name, data if isinstance(data, bytes) else str(data))
                                            for name, data in files.items()], commit_message=f"Add {shared.name}")
    return str(url)


@contextlib.contextmanager
def _told(repository: str) -> Iterator[None]:
    """Turn what the hub, its library and the network answer with into one sentence."""
    from huggingface_hub.utils import HfHubHTTPError

    what = f"{repository} could not be pushed to the Hugging Face hub"
    try:
        yield
    except LoraTrainError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        why, remedy = _ANSWERS.get(status, (f"it answers {status}: {_first_line(error)}", "try again later"))
        raise (HostError if status == 401 else OutputError)(what, why=why, remedy=remedy) from error
    except Exception as error:  # requests' errors, httpx' from version 1 of the library on, and its own of what it cannot read
        raise HostError(what, why=f"the hub does not answer ({type(error).__name__})",
                        remedy="check the connection, then try again") from error


_ANSWERS = {
    401: ("the login is not accepted", "run `huggingface-cli login` again, or set HF_TOKEN"),
    403: ("the login may not write there", "take a token that may write, and a repository of your own"),
    404: ("there is no such user or organisation, or the login may not see it", "check the name"),
    413: ("the files are too large for it", "save the LoRA as fp16, or with a smaller rank"),
    429: ("it was asked too often", "try again in some minutes")}


def _first_line(error: Exception) -> str:
    """What an error says, on one line and short."""
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__
