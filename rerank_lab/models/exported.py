"""Runs transformers by another runtime (torch.compile, ONNX Runtime, OpenVINO) or in another precision, with the interface of Padded."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rerank_lab.errors import UserError
from rerank_lab.models.packed import Packed
from rerank_lab.models.padded import ForwardOutput, Padded, first_of, reads_padding
from rerank_lab.models.runtimes import PRECISIONS, RUNTIMES

NEEDED_PACKAGES = {("compile", "int8"): ("torchao",), ("onnx", "fp32"): ("onnxruntime", "onnx"), ("onnx", "int8"): ("onnxruntime", "onnx")}
NEEDED_PACKAGES |= {("openvino", precision): ("openvino", "onnx") for precision in ("fp32", "bf16")}
HEADS = ("BertForSequenceClassification", "RobertaForSequenceClassification", "XLMRobertaForSequenceClassification")
RuntimeCall = Callable[[dict[str, Tensor], bool], Sequence[Tensor]]  # inputs by name, and TensorModel.detailed → outputs of TensorModel.forward


def choose(runtime: str, precision: str) -> str:
    """The runtime for a precision. "auto" is the first of RUNTIMES that computes in it.

    Args:
        runtime: "auto" or one of RUNTIMES.
        precision: one of PRECISIONS.

    Raises:
        UserError: the runtime or the precision is unknown, the two do not go together, or a package is not installed.
    """
    if precision not in PRECISIONS or runtime not in ("auto", *RUNTIMES):
        raise UserError(f"runtime {runtime!r} with precision {precision!r}: runtimes are auto, {', '.join(RUNTIMES)}, precisions {', '.join(PRECISIONS)}")
    chosen = next(name for name, able in RUNTIMES.items() if precision in able) if runtime == "auto" else runtime
    if precision not in RUNTIMES[chosen]:
        able = ", ".join(name for name, precisions in RUNTIMES.items() if precision in precisions)
        raise UserError(f"runtime {runtime} does not compute in {precision}; it knows {', '.join(RUNTIMES[chosen])}, and {precision} is computed by {able}")
    missing = [name for name in NEEDED_PACKAGES.get((chosen, precision), ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"runtime {chosen} in {precision} needs {' and '.join(missing)}: pip install 'rerank_lab[runtimes]'")
    return chosen


def network(model: Any, *, pad_id: int, token_types: bool, runtime: str, precision: str, head: bool = False) -> Packed | Padded:
    """Wraps a transformer in what runs it fastest: Packed for BERT and its kind on a CPU, else Padded, or Exported for other runtimes.

    Args:
        model: a model of transformers, in eval mode, fp32, on its device.
        pad_id, token_types: as Padded takes them.
        runtime: as `choose` returns it.
        precision: one of PRECISIONS.
        head: whether the model has a classification head and returns logits. Packed then runs only what is below the head.

    Raises:
        UserError: the model does not read texts as an encoder does, or the runtime does not support it.
    """
    if precision != "fp32" and not head:
        model = copy.deepcopy(model)  # a one-way cross-encoder copies the original weights
    base = model.base_model if head else model
    if runtime == "torch" and Packed.fits(base) and (not head or type(model).__name__ in HEADS):
        return Packed(base, torch.bfloat16 if precision == "bf16" else torch.float32, token_types=token_types)
    try:
        equal_lengths = reads_padding(Padded(model, pad_id, token_types))
    except Exception as error:  # a model of another kind can fail in any way
        raise UserError(
            f"{type(model).__name__} does not read texts as an encoder does ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    if runtime == "torch":
        return Padded(model.to(torch.bfloat16) if precision == "bf16" else model, pad_id, token_types, equal_lengths)
    outputs = TensorModel(model, head)
    try:
        run = BUILD[runtime](outputs, precision, token_types)
    except Exception as error:  # each runtime raises errors of its own
        raise UserError(f"runtime {runtime} in {precision} does not take the model: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return Exported(model, pad_id, token_types, equal_lengths, outputs, run)


class TensorModel(nn.Module):
    """A model as a function from tensors to tensors, which runtimes can trace.

    Args:
        model: a model of transformers.
        head: whether it has a classification head and returns logits.

    Attributes:
        detailed: whether to return also what a one-way cross-encoder reads: keys and values of the layers `upper`.
        upper: the upper half of the layers; empty for a model with a head, or not of BERT's kind.
    """

    def __init__(self, model: Any, head: bool):
        super().__init__()
        self.model, self.head, self.detailed = model, head, False
        layers = [] if head else getattr(getattr(model, "encoder", None), "layer", [])
        bert = all(hasattr(getattr(getattr(layer, "attention", None), "self", None), "key") for layer in layers)
        self.upper = range(len(layers) // 2, len(layers)) if bert else range(0)

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> tuple[Tensor, ...]:
        """Runs the model.

        Args:
            ids, mask, types: B × L.

        Returns:
            with a head: logits, B × 1. Without: the last hidden states, B × L × d; if `detailed` is set, also the hidden
            states that go into the upper S layers, B × L × d, and their keys and values, B × L × 2·d·S.
        """
        given = {} if types is None else {"token_type_ids": types}
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=self.detailed, **given)
        if self.head:
            return (output.logits,)
        if not self.detailed:
            return (output.last_hidden_state,)
        into = output.hidden_states
        parts = [(getattr(self.model.encoder.layer[n].attention.self, name), into[n]) for n in self.upper for name in ("key", "value")]
        return output.last_hidden_state, into[self.upper.start], torch.cat([part(x) for part, x in parts], -1)


class Exported(Padded):
    """A transformer that another runtime runs.

    Args:
        model, pad_id, token_types, equal_lengths: as Padded takes them.
        outputs: the module that was given to the runtime.
        run: calls the runtime.
    """

    def __init__(self, model: Any, pad_id: int, token_types: bool, equal_lengths: bool, outputs: TensorModel, run: RuntimeCall):
        super().__init__(model, pad_id, token_types, equal_lengths)
        self.outputs, self._run = outputs, run

    def logits(self, ids: Tensor, types: Tensor, lengths: Sequence[int], attended: Sequence[int] | None = None) -> Tensor:
        return self._run(self.inputs(ids, types, lengths, attended), False)[0]

    def __call__(
        self,
        ids: Tensor,
        types: Tensor,
        lengths: Sequence[int],
        attended: Sequence[int] | None = None,
        *,
        keep: int | None = None,
        keys_values: range = range(0),
    ) -> ForwardOutput:
        inputs, upper = self.inputs(ids, types, lengths, attended), self.outputs.upper
        if keep not in (None, upper.start) or keys_values not in (range(0), upper):
            raise ValueError(f"only the layers {upper} were handed to the runtime")
        inside = first_of(lengths, inputs["input_ids"].shape[1], inputs["input_ids"].device)
        found = [part.to(inside.device)[inside].float() for part in self._run(inputs, keep is not None or len(keys_values) > 0)]
        return ForwardOutput(found[0], {} if keep is None else {keep: found[1]}, found[2] if len(keys_values) else None)


def _compiled(outputs: TensorModel, precision: str, token_types: bool) -> RuntimeCall:
    if precision == "bf16":
        outputs.model.to(torch.bfloat16)
    elif precision == "int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        inner = _inner(outputs.model)
        with torch.no_grad():
            quantize_(outputs.model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: id(module) in inner)
    compiled = torch.compile(outputs, dynamic=True)

    def run(inputs: dict[str, Tensor], detailed: bool) -> Sequence[Tensor]:
        outputs.detailed = detailed
        found: Sequence[Tensor] = compiled(*inputs.values())
        return found

    return run


def _inner(model: Any) -> set[int]:
    """id() of the linear maps to quantise: those of the layers. Head and pooler are left out, since they are small and matter most.

    Raises:
        UserError: there are none.
    """
    found = {id(module) for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear) and "pooler" not in name}
    if not found:
        raise UserError("it has no linear maps to quantise")
    return found


def _onnx_file(outputs: TensorModel, folder: Path, token_types: bool) -> Path:
    """Writes the model to an ONNX file in a folder, with dynamic batch size and length.

    Raises:
        UserError: the model is not on the CPU; ONNX Runtime and OpenVINO run only there.
    """
    if outputs.model.device.type != "cpu":
        raise UserError("it runs on the CPU here")
    ids = torch.ones(2, 8, dtype=torch.int64, device="cpu")
    outputs.detailed = len(outputs.upper) > 0
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    made = ["logits"] if outputs.head else ["last", "start", "keys_values"] if outputs.detailed else ["last"]
    axes = {name: {0: "batch", 1: "length"} for name in (*names, *made)} | ({"logits": {0: "batch"}} if outputs.head else {})
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its deprecation and of the dynamic shapes
        torch.onnx.export(outputs, (ids,) * len(names), str(path), input_names=names, output_names=made, dynamic_axes=axes, opset_version=18, dynamo=False)
    return path


def _onnx(outputs: TensorModel, precision: str, token_types: bool) -> RuntimeCall:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with tempfile.TemporaryDirectory() as folder:
        path = _onnx_file(outputs, Path(folder), token_types)
        if precision == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(str(path), str(path.with_suffix(".int8")), weight_type=QuantType.QInt8, per_channel=True)
            path = path.with_suffix(".int8")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor], detailed: bool) -> list[Tensor]:
        wanted = None if detailed or outputs.head else ["last"]
        return [torch.from_numpy(part) for part in session.run(wanted, {name: value.numpy() for name, value in inputs.items()})]

    return run


def _openvino(outputs: TensorModel, precision: str, token_types: bool) -> RuntimeCall:
    from openvino import Core  # type: ignore[attr-defined]

    hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision), "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        core = Core()
        graph = core.read_model(_onnx_file(outputs, Path(folder), token_types))
        compiled = core.compile_model(graph, "CPU", hints)

    def run(inputs: dict[str, Tensor], detailed: bool) -> list[Tensor]:
        found = compiled({name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(found[n].copy()) for n in range(len(compiled.outputs) if detailed else 1)]

    return run


BUILD = {"compile": _compiled, "onnx": _onnx, "openvino": _openvino}
