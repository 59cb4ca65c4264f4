"""Shard sets in repositories of the Hugging Face hub: hf://datasets/owner/name[@revision][/folder].

huggingface_hub answers where a file is, with which token, and which commit a branch is at; that
commit is kept while the set is open, so that a moving branch cannot mix two generations.
"""

from __future__ import annotations

import re

from qwen_lora.errors import InputError
from qwen_lora.redact import redact
from qwen_lora.shards.remote.base import RemoteError
from qwen_lora.shards.remote.http import HttpRemote, client_library

_URL = re.compile(
    r"hf://(?P<kind>datasets/|models/)?(?P<repo>(?!datasets/|models/)[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>[^/@]+))?"
    r"(?P<folder>(/[^/@]+)*)/?",
    re.ASCII,
)


class HubRemote(HttpRemote):
    """A folder of a repository at one commit; it can only be read."""

    def __init__(self, label: str, kind: str, repo: str, commit: str, folder: str) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        # A file's address without the file: names are appended to it.
        base = hf_hub_url(repo, f"{folder}/x".lstrip("/"), repo_type=kind, revision=commit)
        super().__init__(label, base.removesuffix("/x"), build_hf_headers())
        self._kind, self._repo, self._commit, self._folder = kind, repo, commit, folder

    def names(self) -> list[str] | None:
        from huggingface_hub import HfApi, errors
        from huggingface_hub.hf_api import RepoFile

        try:
            entries = HfApi().list_repo_tree(
                self._repo,
                self._folder.strip("/") or None,
                repo_type=self._kind,
                revision=self._commit,
            )
            return sorted(
                entry.path.rpartition("/")[2] for entry in entries if isinstance(entry, RepoFile)
            )
        except errors.EntryNotFoundError:
            return []
        except (errors.HfHubHTTPError, client_library().TransportError, OSError) as error:
            raise RemoteError(f"{self.label}: cannot be listed: {_first_line(error)}") from None


def open_hub_remote(url: str) -> HubRemote:
    """Raises InputError for what is no such URL, and for a repository or revision that is not there
    or may not be read, RemoteError when the hub does not answer."""
    from huggingface_hub import HfApi, errors

    parts = _URL.fullmatch(url)
    if parts is None:
        raise InputError(f"{redact(url)}: expected hf://datasets/owner/name[@revision][/folder]")
    kind = (parts["kind"] or "models/").removesuffix("s/")
    repo, revision = parts["repo"], parts["revision"]
    try:
        info = HfApi().repo_info(repo, repo_type=kind, revision=revision)
    except errors.GatedRepoError:
        reason = "is gated; accept its terms on huggingface.co and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = f"is no {kind} repository that can be read (private: set HF_TOKEN)"
    except errors.OfflineModeIsEnabled:
        reason = "cannot be read while HF_HUB_OFFLINE is set"
    except errors.HFValidationError as error:
        reason = f"is not a valid name: {_first_line(error)}"
    except (errors.HfHubHTTPError, client_library().TransportError, OSError) as error:
        raise RemoteError(f"{url}: the hub cannot be reached: {_first_line(error)}") from None
    else:
        assert info.sha is not None
        return HubRemote(url.rstrip("/"), kind, repo, info.sha, parts["folder"])
    raise InputError(f"{url}: {reason}")


def _first_line(error: Exception) -> str:
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])
