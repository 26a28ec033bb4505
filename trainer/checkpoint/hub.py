"""The upload of an export to the Hugging Face hub, as one commit.

The hub is looked at before anything is exported, so that a wrong name, a token without permission
or a repository with files is found at once. The token is the one that huggingface_hub finds: in
HF_TOKEN, or where `hf auth login` put it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError

KEPT = (".gitattributes",)  # the hub's own file, which says what it stores apart


@dataclass(frozen=True)
class Repository:
    """A place on the hub.

    `name`: OWNER/NAME. `files`: in it by now. `commit`: its newest, None if there is no such
    repository yet.
    """

    name: str
    private: bool
    files: tuple[str, ...] = ()
    commit: str | None = None


def look_at(name: str, *, public: bool, replace: bool) -> Repository:
    """Return the place where an export would go. RecipeError if it cannot go there, as far as that
    is known before."""
    with _told(name):
        user = _hub().whoami()
        _require_right_to_write(user, name)
        full = name if "/" in name else f"{user['name']}/{name}"
        found = _found(full, private=not public)
    others = [file for file in found.files if file not in KEPT]
    if others and not replace:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise RecipeError(
            f"--push {full}: it holds {others[0]}{more} already: give another name, or --replace, which puts the export in "
            "their place"
        )
    if not found.private and not public:
        raise RecipeError(f"--push {full}: it is public: add --public, or give another name")
    return found


def push(folder: Path, to: Repository, *, message: str) -> str:
    """Send the folder's files in place of those that are there, in one commit, and return the
    address. RecipeError if that fails: then nothing of them is to be seen there."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    kept = f"; {folder} is whole: the same command with --replace tries again"
    url = f"{_hub().endpoint}/{to.name}"
    if to.commit is None:
        with _told(to.name, kept=kept):
            url = str(_hub().create_repo(to.name, private=to.private))
        kept = f"; the repository was made, and is empty{kept}"
    with _told(to.name, kept=kept):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        new = {path.relative_to(folder).as_posix(): path for path in paths}
        gone = [file for file in to.files if file not in new and file not in KEPT]
        operations: list[Any] = [CommitOperationDelete(file) for file in gone]
        operations += [CommitOperationAdd(file, path) for file, path in new.items()]
        _hub().create_commit(to.name, operations, commit_message=message, parent_commit=to.commit)
    return url


def _hub() -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="triaxis")


def _found(name: str, *, private: bool) -> Repository:
    """Return the repository as it is, or as it would be made."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = _hub().model_info(name)
    except RepositoryNotFoundError:
        return Repository(name, private)
    return Repository(name, bool(info.private), tuple(file.rfilename for file in info.siblings or ()), info.sha)


def _require_right_to_write(user: dict[str, Any], name: str) -> None:
    """Raise RecipeError for a token that says that it may only read."""
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RecipeError(f"--push {name}: the token of {user['name']} may only read: give one with the permission to write")


@contextmanager
def _told(name: str, *, kept: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into one line. `kept`: what is there all the same."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except RecipeError:
        raise
    except HFValidationError:
        said = "is no name of a repository: give NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'"
    except LocalTokenNotFoundError:
        said = "no token: set HF_TOKEN, or log in with hf auth login"
    except OfflineModeIsEnabled:
        said = "HF_HUB_OFFLINE forbids it: unset it, on a machine with a network"
    except HfHubHTTPError as error:
        said = _answer(error)
    except ValueError as error:  # the client asks the hub about the card before it uploads
        said = f"the hub does not take it ({' '.join(str(error).split())})"
    except Exception as error:  # of the HTTP client, of its threads, of the storage behind the hub
        cause = error.__cause__
        known = isinstance(cause, HfHubHTTPError)
        said = _answer(cause) if known else f"the hub cannot be reached ({type(cause or error).__name__}): look at the network"
    else:
        return
    raise RecipeError(f"--push {name}: {said}{kept}")


def _answer(error: Any) -> str:
    """Return what the hub's refusal means, with its own words."""
    status = error.response.status_code
    words = " ".join(str(error.server_message or "").split()).rstrip(".")
    own = f" ({words})" if words else ""
    if status == 401:
        return f"the hub does not know the token{own}: set HF_TOKEN to one that is valid, or log in with hf auth login"
    if status == 403:
        return f"the token may not write there{own}: give one that may, or another name"
    if status in (409, 412):
        return f"it was changed meanwhile{own}: look at it, and push again"
    return f"the hub answered {status}{own}: try again later"
