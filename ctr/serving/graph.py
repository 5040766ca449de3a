"""Run the graph of a tower as it lies in torch.export's archive, operation by operation.

torch.export.load makes a program of it that compilers can go on with: it parses symbolic shapes, runs each operation on
tensors without values and generates code. That takes a second, most of it to import what it is done with. Here the
operations that the archive lists are called in their order, with its weights, and nothing else is made of it. An
archive that says something unknown here, as one of another version of torch may, is left to torch's own loader.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera.ctr.serving.errors import ExportError

SCHEMA = 8  # of the archive, its major version
KINDS = {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16}
KINDS |= {7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16}  # scalar types by their number there
STRIDED = 7  # layout
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
CONTEXT = "torch.ops.higher_order.wrap_with_"
OF_NUMBERS = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "ge", "gt", "le", "lt", "truediv", "pow")
}
OF_NUMBERS |= {f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")}
OF_NUMBERS |= {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_float")}


class UnknownError(Exception):
    """The archive says something that is not known here."""


@dataclass(frozen=True)
class Value:
    """The place of a value among those that a graph computes."""

    place: int


@dataclass(frozen=True)
class Step:
    """One operation. outputs: a place for each result, a list of places where a result is a list. last: values that no
    later operation reads."""

    call: Callable[..., Any]
    inputs: list[Any]
    named: dict[str, Any]
    outputs: list[Any]
    is_one: bool
    last: list[int]


class Steps:
    """The operations of a graph, in their order. Threads share one."""

    def __init__(self, graph: Mapping[str, Any]) -> None:
        """graph: as the archive describes it. Raises UnknownError."""
        self._places: dict[str, int] = {}
        self.inputs = [_name_of(one) for one in graph["inputs"]]
        for name in self.inputs:
            self._place(name)
        nodes = [node for node in graph["nodes"] if not _is_check(node)]
        steps = [self._step(node) for node in nodes]
        self._outputs = [self._read(one) for one in graph["outputs"]]
        self._is_one = bool(graph["is_single_tensor_return"])
        self._steps = _freed(steps, self._outputs)

    def __call__(self, *inputs: Any) -> Any:
        values: list[Any] = [None] * len(self._places)
        values[: len(inputs)] = inputs
        for step in self._steps:
            found = step.call(*_filled(step.inputs, values), **{k: _filled(v, values) for k, v in step.named.items()})
            for place, one in zip(step.outputs, [found] if step.is_one else found, strict=True):
                if isinstance(place, list):
                    for inner, value in zip(place, one, strict=True):
                        values[inner] = value
                else:
                    values[place] = one
            for place in step.last:
                values[place] = None
        outputs = _filled(self._outputs, values)
        return outputs[0] if self._is_one else outputs

    def _place(self, name: str) -> int:
        if name in self._places:
            raise UnknownError(f"value {name!r} twice")
        return self._places.setdefault(name, len(self._places))

    def _step(self, node: Mapping[str, Any]) -> Step:
        target, inputs, named = node["target"], [], {}
        for one in node["inputs"]:
            if one["kind"] == 2:
                named[one["name"]] = self._read(one["arg"])
            elif one["kind"] == 1 or target in OF_NUMBERS:
                inputs.append(self._read(one["arg"]))
            else:
                raise UnknownError(f"{target}: an argument of kind {one['kind']}")
        outputs = [self._written(one) for one in node["outputs"]]
        if target.startswith(CONTEXT):
            return Step(_in_context(target), inputs, named, outputs, bool(node["is_hop_single_tensor_return"]), [])
        return Step(_operation(target), inputs, named, outputs, len(outputs) == 1, [])

    def _read(self, argument: Mapping[str, Any]) -> Any:
        """Return an argument: what it is, or the place of the value that it will be."""
        ((kind, said),) = argument.items()
        if kind in ("as_int", "as_ints", "as_string", "as_bool", "as_bools"):
            return said
        if kind in ("as_float", "as_floats"):  # an infinite one is a text there
            return [float(one) for one in said] if isinstance(said, list) else float(said)
        if kind == "as_none":
            return None
        if kind in ("as_tensor", "as_tensors", "as_sym_int", "as_sym_ints", "as_sym_bool", "as_sym_float"):
            return [self._known(one) for one in said] if isinstance(said, list) else self._known(said)
        if kind in ("as_optional_tensor", "as_optional_tensors"):
            return [self._read(one) for one in said] if isinstance(said, list) else self._read(said)
        if kind == "as_scalar_type" and said in KINDS:
            return KINDS[said]
        if kind == "as_device" and said["type"] == "cpu":
            return torch.device("cpu")
        if kind == "as_layout" and said == STRIDED:
            return torch.strided
        if kind == "as_memory_format" and said in MEMORY_FORMATS:
            return MEMORY_FORMATS[said]
        if kind == "as_graph":
            return Steps(said["graph"])
        raise UnknownError(f"an argument {kind}")

    def _known(self, said: Mapping[str, Any]) -> Any:
        """Return the place of a value by its name, or a number that stands there itself."""
        number = said.get("as_int", said.get("as_float", said.get("as_bool")))
        if number is not None:
            return number
        name = said.get("name", said.get("as_name"))
        if name not in self._places:
            raise UnknownError(f"value {name!r} is nowhere")
        return Value(self._places[name])

    def _written(self, output: Mapping[str, Any]) -> Any:
        ((kind, said),) = output.items()
        if kind == "as_tensors":
            return [self._place(one["name"]) for one in said]
        return self._place(_name_of(output))


def _name_of(said: Mapping[str, Any]) -> str:
    ((kind, one),) = said.items()
    name = one.get("name", one.get("as_name")) if isinstance(one, dict) else None
    if kind not in ("as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float") or name is None:
        raise UnknownError(f"a value {kind}")
    return str(name)


def _is_check(node: Mapping[str, Any]) -> bool:
    """Return whether an operation only compares shapes and types with those at the time of the export."""
    checks = ("_assert_tensor_metadata.", "_assert_scalar.", "sym_constrain_range_for_size.", "sym_constrain_range.")
    return not node["outputs"] and node["target"].removeprefix("torch.ops.aten.").startswith(checks)


def _operation(target: str) -> Callable[..., Any]:
    """Return an operation of torch by its name. Others are left to torch's loader."""
    if target in OF_NUMBERS:
        return OF_NUMBERS[target]
    name, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
    try:
        found = getattr(getattr(torch.ops.aten, name), overload)
    except (AttributeError, RuntimeError):
        found = None
    if found is None or not target.startswith("torch.ops.aten."):
        raise UnknownError(f"operation {target}")
    return found


def _in_context(target: str) -> Callable[..., Any]:
    """Return what runs a graph in the context in which its operations were seen."""

    def autocast(*said: Any) -> Any:
        device, dtype, enabled, cached, steps, *inputs = said
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=cached):
            return steps(*inputs)

    def gradients(*said: Any) -> Any:
        enabled, steps, *inputs = said
        with torch.set_grad_enabled(enabled):
            return steps(*inputs)

    known = {"autocast": autocast, "set_grad_enabled": gradients}
    if target.removeprefix(CONTEXT) not in known:
        raise UnknownError(f"operation {target}")
    return known[target.removeprefix(CONTEXT)]


def _filled(said: Any, values: list[Any]) -> Any:
    if type(said) is Value:
        return values[said.place]
    if type(said) is list:
        return [_filled(one, values) for one in said]
    return said


def _places(said: Any) -> set[int]:
    if isinstance(said, Value):
        return {said.place}
    return set().union(*map(_places, said)) if isinstance(said, list) else set()


def _freed(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """Return the steps with the values that can be forgotten behind each, so that memory is that of a few."""
    kept, found = _places(outputs), []
    for step in reversed(steps):
        read = _places([step.inputs, list(step.named.values())])
        written = _places([[Value(one) for one in ([p] if isinstance(p, int) else p)] for p in step.outputs])
        found.append(
            Step(step.call, step.inputs, step.named, step.outputs, step.is_one, sorted((read | written) - kept))
        )
        kept |= read
    return found[::-1]


class Graph:
    """The graph of a tower with its weights, a call of which gives what the tower gives. Threads may share one.

    Attributes:
        weights: by name; what a later model of the same graph has in their place.
    """

    def __init__(self, steps: Steps, inputs: list[Any], weights: dict[str, Tensor], *, is_one: bool) -> None:
        """inputs: of the steps, each the name of a weight, a value that is always the same, or the place among the
        inputs of a call. is_one: a call returns a tensor, not several."""
        self.weights, self._steps, self._inputs, self._is_one = weights, steps, inputs, is_one

    def __call__(self, *inputs: Tensor) -> Any:
        of = [self.weights[one] if isinstance(one, str) else one for one in self._inputs]
        found = self._steps(*_filled(of, list(inputs)))
        return found[0] if self._is_one else tuple(found)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return self.weights

    def with_weights(self, weights: Mapping[str, Tensor]) -> Graph:
        """Return the same graph with other weights. Raises ValueError: they are of another graph."""
        shapes = [{name: tuple(one.shape) for name, one in these.items()} for these in (self.weights, weights)]
        if shapes[0] != shapes[1]:
            odd = sorted(str(name) for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
            raise ValueError(f"{odd[0]} is missing, left over or of another shape")
        mine = {
            name: weights[name].detach().to(one.dtype, copy=True).requires_grad_(one.requires_grad)
            for name, one in self.weights.items()
        }
        return Graph(self._steps, self._inputs, mine, is_one=self._is_one)


class TorchGraph:
    """The same by torch's own loader, for archives that say something unknown here."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, *inputs: Tensor) -> Any:
        return self._module(*inputs)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return dict(self._module.state_dict())

    def with_weights(self, weights: Mapping[str, Tensor]) -> TorchGraph:
        """Return the same graph with other weights. Raises RuntimeError: they are of another graph."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what copying calls
            made = copy.deepcopy(self._module)
        made.load_state_dict(dict(weights))
        return TorchGraph(made)


AnyGraph = Graph | TorchGraph


def load_graph(path: Path) -> AnyGraph:
    """Return the graph in an archive of torch.export.

    Raises ExportError: the file cannot be read, or a part of it is pickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = _Archive(archive)
            found.refuse_pickles()
            try:
                return found.graph()
            except (UnknownError, LookupError, TypeError, AttributeError):
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's loader, about memory that it maps
            return TorchGraph(torch.export.load(path).module())
    except ExportError:
        raise
    except Exception as error:  # torch raises what its parsers do
        raise ExportError(f"{path} cannot be loaded: {' '.join(str(error).split())[:200]}") from None


class _Archive:
    """An archive that is open. All of its names are below one folder."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = archive.namelist()
        top = {name.partition("/")[0] for name in names}
        if len(top) != 1:
            raise ExportError(f"{archive.filename} cannot be loaded: it is no archive of torch.export")
        self._top = top.pop()
        self._names = [name.partition("/")[2] for name in names]

    def _json(self, name: str) -> Any:
        return json.loads(self._archive.read(f"{self._top}/{name}"))

    def refuse_pickles(self) -> None:
        """Raise ExportError where a part is pickled, which torch's loader would run."""
        configs = [one for one in self._names if one.startswith("data/") and one.endswith("_config.json")]
        pickled = [
            part
            for config in configs
            for part, about in self._json(config)["config"].items()
            if about["use_pickle"] or not about["path_name"].startswith(("weight_", "tensor_"))
        ]
        empty = {info.filename.partition("/")[2] for info in self._archive.infolist() if not info.file_size}
        pickled += [one for one in self._names if one.endswith(".pt") and one not in empty]
        if pickled:
            raise ExportError(f"{self._archive.filename} cannot be loaded: {pickled[0]!r} in it is pickled")

    def graph(self) -> Graph:
        """Raises UnknownError, LookupError, TypeError, AttributeError: it is not as known here."""
        program = self._json("models/model.json")
        little = self._archive.read(f"{self._top}/byteorder") == sys.byteorder.encode()
        if program["schema_version"]["major"] != SCHEMA or not little:
            raise UnknownError("another version")
        module = program["graph_module"]
        weights, constants = self._tensors("weights"), self._tensors("constants")
        inputs: list[Any] = []
        used: dict[str, Tensor] = {}
        for one in module["signature"]["input_specs"]:
            ((kind, said),) = one.items()
            name = said.get("parameter_name", said.get("buffer_name", said.get("tensor_constant_name")))
            if kind == "user_input":
                inputs.append(Value(sum(isinstance(one, Value) for one in inputs)))
            elif kind == "tensor_constant" or (kind == "buffer" and not said["persistent"]):
                inputs.append(constants[name])
            elif kind in ("parameter", "buffer"):
                used[name] = weights[name]
                inputs.append(name)
            else:
                raise UnknownError(f"an input {kind}")
        if {next(iter(one)) for one in module["signature"]["output_specs"]} != {"user_output"}:
            raise UnknownError("an output that is none of the caller's")
        called = json.loads(next(e for e in module["module_call_graph"] if not e["fqn"])["signature"]["out_spec"])
        return Graph(Steps(module["graph"]), inputs, used, is_one=called[1]["type"] is None)

    def _tensors(self, kind: str) -> dict[str, Tensor]:
        """Return weights or constants by name."""
        found = {}
        for name, about in self._json(f"data/{kind}/model_{kind}_config.json")["config"].items():
            meta = about["tensor_meta"]
            if meta["layout"] != STRIDED or meta["device"]["type"] != "cpu" or meta["dtype"] not in KINDS:
                raise UnknownError(f"tensor {name}")
            shape, strides = ([one["as_int"] for one in meta[key]] for key in ("sizes", "strides"))
            content = bytearray(self._archive.read(f"{self._top}/data/{kind}/{about['path_name']}"))
            dtype, first = KINDS[meta["dtype"]], meta["storage_offset"]["as_int"]
            stored = torch.frombuffer(content, dtype=dtype).clone() if content else torch.empty(0, dtype=dtype)
            value = torch.as_strided(stored, shape, strides, first)
            # Whether a weight can learn decides how matmul folds its other side, and so the last bit.
            found[name] = nn.Parameter(value, requires_grad=meta["requires_grad"]) if about["is_param"] else value
        return found
