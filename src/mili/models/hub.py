"""From the model the user named to a local folder: bundled, local, or from the Hugging Face hub.

Knows names and folders; reads no model file. Downloading, caching, authentication and the progress bars are
``huggingface_hub``'s, so ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean there.
Invariant: whatever goes wrong, the caller gets one ConfigError that says what to do.
"""

import re
from pathlib import Path

from mili.errors import ConfigError

BUNDLED_MODEL = Path(__file__).parents[1] / "data" / "tiny-qwen3-code"
# Files of the repository's root only: some keep a second format of the same weights in a subfolder.
_CONFIG_PATTERNS = ["*.json", "*.jinja"]
_WEIGHT_PATTERNS = ["*.safetensors"]
_SUBFOLDERS = ["*/*"]
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve_model(model: str | Path | None = None, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that holds ``model``: a local folder, a hub repository "owner/name", or None for the bundled model.

    A local folder wins over a repository of the same name. ``revision`` is a branch, tag or commit of the repository;
    without ``weights`` only the small files are fetched. Raises ConfigError: no such folder or repository, no network,
    offline and not cached, a revision for something that has none.
    """
    if model == "":  # Path("") is the working folder, which nobody asked for
        raise ConfigError("model is empty; give a folder, a hub name 'owner/name', or None for the bundled model")
    folder = BUNDLED_MODEL if model is None else Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision {revision!r} is for hub models, but {folder} is a local folder; leave it out")
        return folder
    if folder.exists():
        raise ConfigError(f"{folder} is a file; give the folder that holds config.json and the *.safetensors files")
    if isinstance(model, Path) or not _REPOSITORY.fullmatch(str(model)):
        raise ConfigError(
            f"model {str(model)!r} is neither a folder on this machine nor a hub name of the form 'owner/name'"
        )
    assert isinstance(model, str)
    return _download(model, revision, weights)


def _download(repository: str, revision: str | None, weights: bool) -> Path:
    # Imported here: it takes a third of a second, and most runs need a local folder only.
    from huggingface_hub import constants, errors, snapshot_download

    name = repository if revision is None else f"{repository} at revision {revision!r}"
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=_CONFIG_PATTERNS + (_WEIGHT_PATTERNS if weights else []),
            ignore_patterns=_SUBFOLDERS,
        )
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{repository} has no revision {revision!r}; check the branch, tag or commit") from error
    except errors.GatedRepoError as error:
        raise ConfigError(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name} is not on {constants.ENDPOINT}, or is private: check the name, or set HF_TOKEN"
        ) from error
    except Exception as error:  # the hub's client lets through whatever its HTTP library raises
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{name} is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set; "
                "unset it to download, or give a local folder"
            ) from error
        raise ConfigError(
            f"cannot download {name} from {constants.ENDPOINT} ({type(error).__name__}: {error}); "
            "check the network, or give a local folder"
        ) from error
    return Path(folder)
