"""Fetches from the hub what a model needs to run here, and nothing else: no second format of its weights, no copy for another runtime.

A repository is fetched in steps, since what is needed next stands in what was fetched before: first its small files, then
the folders of its modules with their weights in safetensors, then, where there are none, weights in several files or in
torch's own format. huggingface_hub keeps each file once, whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath

from rerank_lab.errors import UserError
from rerank_lab.models.folder import Folder, as_dict, last_part, read_json

# Small files: configurations, the tokenizer, templates, and the settings of Stanford's ColBERT.
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "artifact.metadata")
# Weights beside the transformer's: the multi-vector head of bge-m3.
HEADS = ("colbert_linear.pt",)
SAFE, TORCH = "model.safetensors", "pytorch_model.bin"
WITHOUT_WEIGHTS = ("Pooling", "Normalize", "Dropout", "SpladePooling")
# Files of folders that are refused for what they say: a LoRA adapter without its model, modules of their own for each side.
REFUSED = ("adapter_config.json", "router_config.json")


def fetch(name: str, known: Iterable[str]) -> Path:
    """The folder of a model of the hub, fetched if it is not in the hub's cache.

    Args:
        name: of the repository.
        known: ids that messages name.

    Raises:
        UserError: the hub does not give it, or has no weights of it for torch.
    """
    try:
        folder = _download(name, SMALL, ["*/*"])
        if any((folder / file).is_file() for file in REFUSED):
            return folder
        places = _places(Folder(folder, name))
        inside = [escape(place) for place in places if place]
        deeper = [f"{place}*/*" for place in inside if not any(other != place and other.startswith(place) for other in inside)]
        _download(name, [SAFE, *HEADS, *(f"{place}{file}" for place in inside for file in (*SMALL, SAFE))], deeper)
        steps: list[Callable[[Path], list[str]]] = [partial(_parts, kind=SAFE), lambda place: [TORCH], partial(_parts, kind=TORCH)]
        for weights in steps:
            if wanted := [f"{place}{file}" for place in _lacking(folder, places) for file in weights(folder / place)]:
                _download(name, [escape(file) for file in wanted])
    except UserError:
        raise
    except Exception as error:  # the hub client raises errors of its own, of its transport and of the system
        raise UserError(f"model {name!r} is no known id ({', '.join(known)}), no folder, and the hub did not give it: {str(error).splitlines()[0]}") from error
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.rglob("*")):
        raise UserError(
            f"model {name!r}: the hub has no weights of it for torch; where it has those of ONNX or GGUF alone, name the model that they were made of"
        )
    return folder


def _places(folder: Folder) -> list[str]:
    """The folders of a repository that hold modules, each with a slash at its end; "" for its root, which comes first."""
    inside = [str(PurePosixPath(path)) for _, path in folder.modules]
    return list(dict.fromkeys(["", *(f"{path}/" for path in inside if path != ".")]))


def _lacking(folder: Path, places: Sequence[str]) -> list[str]:
    """The places that should have weights and have none, or a part of them."""
    bare = {f"{path}/" for kind, path in Folder(folder, "").modules if last_part(kind) in WITHOUT_WEIGHTS}
    return [place for place in places if place not in bare and not _whole(folder / place)]


def _whole(place: Path) -> bool:
    """Whether a folder has weights of a kind, in one file or in all those that an index names."""
    return any((place / kind).exists() or ((parts := _parts(place, kind)) and all((place / file).exists() for file in parts)) for kind in (SAFE, TORCH))


def _parts(place: Path, kind: str) -> list[str]:
    """The files that hold the weights of a folder, where they lie in several of a kind (SAFE or TORCH), by their index."""
    named = {str(file) for file in as_dict(read_json(place / f"{kind}.index.json").get("weight_map")).values()}
    return sorted(file for file in named if file == PurePosixPath(file).name)


def _download(name: str, allowed: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Fetches the files of these patterns, in which * stands for slashes too."""
    from huggingface_hub import snapshot_download

    some = ("config.json", "modules.json")  # the client warns where nothing is wanted
    return Path(snapshot_download(name, allow_patterns=[*some, *allowed], ignore_patterns=list(ignored) or None))
