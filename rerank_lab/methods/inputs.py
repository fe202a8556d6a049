"""Checks and converts what users pass in: documents, scores, counts, weights, paths. What does not fit is refused by a message that names the argument."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Complex, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rerank_lab.errors import UserError
from rerank_lab.files import expanded, valid_text
from rerank_lab.models.base import Overrides

Document = str | Mapping[str, Any]
HEAVIEST = 1e9  # the largest weight of a z-score: squares of weighted sums still fit fp32


def documents(given: Iterable[Any]) -> list[Document]:
    """Documents as a list, in their order.

    Args:
        given: a list, tuple, deque, iterator, pandas or polars Series (its index is ignored), numpy or pyarrow array, or a
            column of a dataset.

    Raises:
        UserError: it is a single text, a table, a mapping or a set, or an item is no document; the message names its position.
    """
    if isinstance(given, (str, bytes, bytearray, memoryview)):
        raise UserError(f"documents must be a list of texts, not one {type(given).__name__}: write [text] to rank one document")
    if isinstance(given, (Mapping, ItemsView)):
        column = isinstance(given, Mapping) and not isinstance(given.get("text", ""), str)
        hint = "documents['text']" if column else "list(documents.values()), or [document] to rank one object"
        raise UserError(f"documents must be a list, not a mapping: give {hint}")
    if isinstance(given, AbstractSet) and not isinstance(given, (KeysView, Sequence)):
        raise UserError("documents must be in an order, and a set has none: give a list")
    found = [_python(item) for item in _items("documents", given)]
    for i, document in enumerate(found):
        text_of(document, i)
    return found


def text_of(document: Any, position: int) -> str:
    """The text of a document, as a plain str.

    Args:
        document: a string, or a mapping with the string under `text`.
        position: of the document, for messages.

    Raises:
        UserError: the document has no text.
    """
    if type(document) is str:
        return document
    text = _python(document.get("text")) if isinstance(document, Mapping) else document
    if isinstance(text, str):
        return str.__str__(text)
    place, under = f"documents[{position}]", " under 'text'" if isinstance(document, Mapping) else ""
    hint = "must be a string or an object with a string under 'text'"
    if under and "text" not in document:
        raise UserError(f"{place} {hint}; its keys are {', '.join(map(repr, list(document)[:5])) or 'none'}")
    if _missing(text):
        raise UserError(f"{place} is missing ({text!r}{under}): it {hint}")
    if isinstance(text, (bytes, bytearray)):
        raise UserError(f"{place} holds bytes{under}: decode them first, as in .decode('utf-8')")
    for name in ("page_content", "text", "content"):
        if isinstance(getattr(text, name, None), str):
            raise UserError(f"{place} {hint}, not {_kind(text)}: give [d.{name} for d in documents]")
    raise UserError(f"{place} {hint}, not {_kind(text)}{under}")


def scores(given: Iterable[Any], count: int) -> Tensor:
    """First-stage scores as a tensor: N, fp32, on the CPU.

    All scores are scaled by one power of two, so that their squares fit fp32. Their z-scores stay the same.

    Args:
        given: N numbers by position: a list, Series, array, tensor or iterator.
        count: N, the number of documents.

    Raises:
        UserError: the number of scores is wrong, or one is not finite; the message names its position.
    """
    if isinstance(given, (str, bytes, Mapping, AbstractSet)):
        raise UserError(f"first_stage must be a list of numbers, one a document, not {_kind(given)}")
    items = given.detach().to_dense().cpu().tolist() if isinstance(given, Tensor) else list(_items("first_stage", given))
    if not isinstance(items, list) or len(items) != count:
        raise UserError(f"first_stage has {len(items) if isinstance(items, list) else 'no'} scores for {count} documents")
    numbers = [real(f"first_stage[{i}]", _python(item)) for i, item in enumerate(items)]
    exponent = math.frexp(max(map(abs, numbers), default=0.0))[1]
    return torch.tensor([math.ldexp(number, -exponent) for number in numbers], dtype=torch.float32, device="cpu")


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number of any numeric type, as an int.

    Args:
        name: the argument, for messages.
        value: as the user gave it.
        least, most: inclusive bounds; most None: no upper bound.

    Raises:
        UserError: the value is no whole number or out of bounds.
    """
    try:
        if type(value).__name__ in ("bool", "bool_"):
            raise TypeError
        number = operator.index(value if not hasattr(value, "is_integer") or not value.is_integer() else int(value))
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be a whole number of at least {least}, not {_shown(value)}") from None
    if number < least:
        raise UserError(f"{name} must be at least {least}, not {value}")
    if most is not None and number > most:
        raise UserError(f"{name} must be at most {most}, not {value}")
    return number


def weight(name: str, value: Any, least: float = 0.0, most: float = HEAVIEST) -> float:
    """A finite number from `least` to `most`, as a float. Arguments as for `whole`.

    Raises:
        UserError: the value is no finite number or out of bounds.
    """
    wanted = f" from {least:g} to {most:g}"
    number = real(name, value, wanted)
    if not least <= number <= most:
        raise UserError(f"{name} must be a finite number{wanted}, not {_shown(value)}")
    return number


def real(name: str, value: Any, wanted: str = "") -> float:
    """A finite number of any real type, as a float.

    Args:
        name: the argument, for messages.
        value: as the user gave it.
        wanted: the bounds, for messages.

    Raises:
        UserError: the value is no finite number.
    """
    try:
        if isinstance(value, (str, bytes)) or (isinstance(value, Complex) and not isinstance(value, Real)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} must be a finite number{wanted}, not {_shown(value)}")
    return number


def overrides(query_prompt: Any, document_prompt: Any, truncate_dim: Any, instruction: Any, model: object, cross: object) -> Overrides:
    """What a person asks of the models in place of what their folders say.

    Args:
        query_prompt, document_prompt, truncate_dim, instruction: as the user gave them; None: nothing.
        model, cross: the models: a name, a loaded model, or None.

    Raises:
        UserError: a prompt or the instruction is no text, truncate_dim is no whole number of at least 1, or no model is loaded that would read it.
    """
    for name, given in (("query_prompt", query_prompt), ("document_prompt", document_prompt), ("instruction", instruction)):
        if given is not None and not (isinstance(given, str) and valid_text(given)):
            raise UserError(f"{name} must be a string, not {_shown(given)}")
    kept = None if truncate_dim is None else whole("truncate_dim", truncate_dim)
    of_model = {"query_prompt": query_prompt, "document_prompt": document_prompt, "truncate_dim": truncate_dim}
    for name, given, reads, role in (*((name, given, model, "model") for name, given in of_model.items()), ("instruction", instruction, cross, "model_cross")):
        if given is not None and not isinstance(reads, str):
            remedy = f"name one as {role}" if reads is None else f"{role} is loaded already: give it as overrides to the call that loads it"
            raise UserError(f"{name}: no model is loaded here that reads it; {remedy}")
    return Overrides(query_prompt, document_prompt, kept, instruction)


def path(name: str, given: Any) -> str | None:
    """A path or URL with ~ expanded; None stays None.

    Args:
        name: the argument, for messages.
        given: as the user gave it.

    Raises:
        UserError: it is neither a string nor a path, or is empty.
    """
    if given is None:
        return None
    if not isinstance(given, (str, os.PathLike)) or not isinstance(os.fspath(given), str) or not os.fspath(given):
        raise UserError(f"{name} must be a path or None, not {_shown(given)}")
    return expanded(str.__str__(os.fspath(given)))


def files_state(*places: Any) -> tuple[Any, ...]:
    """A hashable value that changes whenever the files at these paths change.

    For each path: the files there, with their modification times and sizes. Values that are no path, or where nothing exists,
    are returned as they are.
    """
    found: list[Any] = []
    for place in places:
        root = Path(expanded(os.fspath(place))).absolute() if isinstance(place, (str, os.PathLike)) and str(place) else None
        files = [] if root is None or not root.exists() else sorted(file for file in (root, *root.rglob("*")) if file.is_file())
        found.append((str(root), tuple((str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)) if files else place)
    return tuple(found)


def model(name: str, given: Any) -> Any:
    """The name of a model as the registry takes it. A Path always means a folder or file, never an id. A loaded model is returned as it is.

    Args:
        name: the argument, for messages.
        given: as the user gave it.

    Raises:
        UserError: a Path does not exist.
    """
    if isinstance(given, os.PathLike):
        place = path(name, given)
        assert place is not None
        if not Path(place).exists():
            raise UserError(f"{name}: there is no {place}; a model of a registry or hub is named by a string")
        return place if os.path.isabs(place) else os.path.join(".", place)
    return expanded(str.__str__(given)) if isinstance(given, str) else given


def _items(name: str, given: Any) -> Iterator[Any]:
    if hasattr(given, "columns") and not isinstance(given, Sequence):
        raise UserError(f"{name} must be one column, not a table ({type(given).__name__}): give that of the texts, as in table['text']")
    if getattr(given, "ndim", 1) != 1:
        raise UserError(f"{name} must be a list, not {f'an array of shape {tuple(given.shape)}' if hasattr(given, 'shape') else _kind(given)}")
    try:
        return iter(given)
    except TypeError:
        raise UserError(f"{name} must be a list, not {_kind(given)}") from None


def _python(item: Any) -> Any:
    """The Python value of a pyarrow scalar; anything else as it is."""
    return item if type(item) is str or not callable(getattr(item, "as_py", None)) else item.as_py()


def _missing(value: Any) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType", "MaskedConstant") or (isinstance(value, float) and math.isnan(value))


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"
