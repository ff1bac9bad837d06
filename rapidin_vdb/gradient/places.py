"""Whether the folders of a model and of its adapter are there, before anything is looked for on the hub."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from rapidin_vdb.errors import ModelError, ModelNotFoundError, check_unicode, without_secrets
from rapidin_vdb.records import ModelSpec


def check_places(spec: ModelSpec) -> None:
    """See that a model's folder and its adapter's are there, where they are folders and not names on the hub.

    Raises:
        ModelError: one is not, or is no such folder.
    """
    check_place(spec.model, "model", "config.json")
    if spec.adapter is not None:
        check_place(spec.adapter, "adapter", "adapter_config.json")


def check_place(name: str, what: str, file: str) -> None:
    """Find a mistyped folder before anything looks for it on the hub; `file` is in each that is none.

    Raises:
        ModelError: there is no such folder, or it is of something else.
    """
    check_unicode(name, f"the name of the {what}")
    path = Path(name)
    if path.is_dir():
        if what == "model" and (path / "adapter_config.json").is_file():
            raise ModelError(
                f"the model folder {name} holds an adapter (adapter_config.json), which would be put on it "
                "unasked. Give it as --adapter, and the model that it is for as --model; merged weights need "
                "a folder of their own"
            )
        if not (path / file).is_file():
            raise ModelNotFoundError(
                f"the {what} folder {name} has no {file}; give the folder that save_pretrained wrote"
            )
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"no {what} at {without_secrets(name)}: no such folder")
    elif name.count("/") == 1 and path.parent.is_dir() and not _is_downloaded(name, file):
        raise ModelNotFoundError(
            f"no {what} at {name}: no such folder in {path.parent}, which is here. If it is a name on the Hugging Face "
            f"hub, download it first (hf download {name}), or go where no folder is named {path.parent}"
        )


def _is_downloaded(name: str, file: str) -> bool:
    """Say whether a file of that place on the hub is on this machine; also of what can be no name there."""
    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except ValueError:
        return False


def check_weights(name: str) -> None:
    """See that a model's folder holds weights, and not those alone that are never loaded.

    Raises:
        ModelNotFoundError: it does not.
    """
    path = Path(name)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"the model folder {name} has no model.safetensors; give the folder that save_pretrained wrote, all of it. "
            "Pickled weights (.bin) are not loaded, for they can run code"
        )
