"""What a Transformer module of sentence-transformers does: its task, its output, and whether its input goes through a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.models.families import BI, CAUSAL, CROSS, LATE, SPARSE
from rerank_lab.models.folder import as_dict, read_json

ARGUMENTS = ("model_args", "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs")
# Arguments that change no score.
HARMLESS = {"attn_implementation", "dtype", "low_cpu_mem_usage", "torch_dtype", "trust_remote_code", "use_safetensors"}
# Family → transformer_task, the output of `forward`, and the module's name for it.
STATES = ("feature-extraction", "last_hidden_state", "token_embeddings")
TASKS = {
    BI: STATES,
    LATE: STATES,
    SPARSE: ("fill-mask", "logits", "token_embeddings"),
    CROSS: ("sequence-classification", "logits", "scores"),
    CAUSAL: ("text-generation", "logits", "causal_logits"),
}
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENISING = {"max_length", "padding", "restore_suffix", "return_tensors", "truncation"}  # arguments of a chat template that change how its text is cut


@dataclass(frozen=True)
class ChatSettings:
    """How a query and a document enter the chat template of a checkpoint.

    Attributes:
        format: "flat" (the content of a message is a string), "structured" (a list of parts), or "auto" (as the template looks).
        arguments: further variables of the template, such as add_generation_prompt.
    """

    format: str = "auto"
    arguments: tuple[tuple[str, object], ...] = ()


def check_task(settings: Mapping[str, Any], root: Path, name: str, role: str, *, bare: bool) -> ChatSettings | None:
    """How a Transformer module reads pairs by a chat template; None: it reads plain text.

    Args:
        settings: of the module.
        root: its folder.
        name: of the model.
        role: what it is for, a key of TASKS.
        bare: whether there is no modules.json. sentence-transformers then uses a template wherever the tokenizer has one.

    Raises:
        UserError: it returns something else than the usual output of `forward`, or a setting is not supported.
    """
    task, output, module_output = TASKS[role]
    given = settings.get("transformer_task") or task
    if given != task:
        raise UserError(f"model {name!r} runs its transformer for {given} (transformer_task), which is not computed here; {task} is")
    modalities, processing = settings.get("modality_config"), as_dict(settings.get("processing_kwargs"))
    message = "message" in modalities if isinstance(modalities, dict) else bare and bool(chat_template(root))
    if message and role not in (CROSS, CAUSAL):
        raise UserError(f"model {name!r} reads its input through a chat template, which is not done here; name a model that reads plain text")
    for kind in ("message", "text") if isinstance(modalities, dict) and message else ("text",) if modalities is not None else ():
        read = as_dict(as_dict(modalities).get(kind))
        missing = message and kind == "text" and not read
        if not missing and (
            read.get("method") != "forward" or read.get("method_output_name") != output or settings.get("module_output_name") not in (None, module_output)
        ):
            raise UserError(f"model {name!r}: modality_config or module_output_name asks for other outputs than {output}, which is not computed here")
    arguments = as_dict(processing.get("chat_template")) if message else {}
    odd = {key: value for key, value in processing.items() if value and not (key == "chat_template" and message)}
    odd |= {key: arguments[key] for key in TOKENISING & arguments.keys()}
    sides = () if role == LATE else ("query_length", "document_length", "query_expansion")
    for key, value in [*((key, settings.get(key)) for key in sides), *odd.items()]:
        if value and (not isinstance(value, dict) or any(value.values())):
            raise UserError(f"model {name!r}: {key} in its Transformer's settings is {value!r}, which is not done here")
    for key in ARGUMENTS:
        if unknown := sorted(set(as_dict(settings.get(key))) - HARMLESS):
            raise UserError(f"model {name!r}: {key} in its Transformer's settings gives {', '.join(unknown)}, which is not done here")
    return ChatSettings(str(as_dict(as_dict(modalities).get("message")).get("format") or "auto"), tuple(sorted(arguments.items()))) if message else None


def chat_template(root: Path) -> str:
    """The text of a tokenizer's chat templates; "" without any."""
    found = [(root / file).read_text(encoding="utf-8", errors="replace") for file in TEMPLATES if (root / file).is_file()]
    found += [path.read_text(encoding="utf-8", errors="replace") for path in sorted(root.glob("additional_chat_templates/*.jinja"))]
    return "\n".join([*found, str(read_json(root / "tokenizer_config.json").get("chat_template") or "")]).strip()
