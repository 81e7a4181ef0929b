"""An unpickler for checkpoints from other people. It builds only tensors, arrays and plain containers.

A pickle is a program. It reaches code in only one way: it asks for a global by module and name (`find_class`) and calls
the result. Here every global comes from the tables below, which contain this module's own builders. The pickle never
gets a class, function or module of the process. So a pickle can do three things with a global:
- call a builder of `_BUILDERS`, which makes plain data from plain data;
- name a storage type or a dtype, which are constants;
- use a placeholder for a class of a training framework (for example a logging buffer), which stores and does nothing.
Any other global raises `CheckpointError` with its name.

pickle also calls methods of the objects that it has built. Builders and placeholders refuse or ignore these calls, and
arrays check them. A tensor's own `__setstate__` may change its shape or gradient flags, within torch's bounds checks.
"""
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is not safe to read, or does not fit the model. The message is one line."""


def one_line(text: object, limit: int = 200) -> str:
    """`text` on one line and cut to `limit` characters, because names in files may contain any characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


class _Builder:
    """A function that a pickle may call but not change: on a plain function, BUILD would set any attribute."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state) -> None:
        raise CheckpointError("it tries to change a function")


class _Placeholder:
    """Stands for an object of a framework. It accepts all calls from a pickle and stores nothing."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def _ignore(self, *args) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


def _get_attribute(owner: object, name: str) -> _Placeholder:
    # mmengine's HistoryBuffer pickles its methods as getattr(HistoryBuffer, "mean"). Other uses could reach code.
    if not (isinstance(owner, type) and issubclass(owner, _Placeholder)):
        raise CheckpointError("it asks for builtins.getattr on an object that is not a placeholder")
    return _Placeholder()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Protocol 2 writes bytes as codecs.encode(text, "latin1"). Other codecs are not needed, and some decompress.
    if not isinstance(text, str) or encoding != "latin1":
        raise CheckpointError(f"it asks for codecs.encode with {one_line(encoding, 40)}")
    return text.encode("latin1")


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    """A view of the flat tensor `storage`. The other arguments, requires_grad and hooks, are not restored."""
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise CheckpointError("a tensor has an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(size) and last >= storage.numel():
        raise CheckpointError("a tensor reaches outside its storage")
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _rebuild_from_type(function: _Builder, tensor_type: object, args: tuple, state: object) -> Tensor:
    # torch calls any `function`; here it must be one of our builders. A tensor's subclass and attributes are dropped.
    if not isinstance(function, _Builder):
        raise CheckpointError("it asks for torch._tensor._rebuild_from_type_v2 with an unknown function")
    return function(*args)


class _Dtype:
    """A numpy dtype while it is unpickled. numpy's own would accept any layout, even in its shared dtypes."""

    __slots__ = ("value",)

    def __init__(self, name: str, *_: object) -> None:
        # Numbers, booleans and strings. Object and structured arrays are not needed and contain more than numbers.
        if not re.fullmatch(r"[biufcSU]\d{1,4}", str(name)):
            raise CheckpointError(f"it asks for a numpy array of {one_line(name, 40)}")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        if byte_order not in ("<", ">", "=", "|"):
            raise CheckpointError(f"a numpy dtype has the byte order {one_line(byte_order, 40)}")
        self.value = self.value.newbyteorder(byte_order)


def _array(shape: tuple, dtype: _Dtype, data: bytes | bytearray | str, order: str) -> np.ndarray:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)  # a str if Python 2 wrote the pickle
    if math.prod(shape) * dtype.value.itemsize != len(raw) or min(shape, default=0) < 0:
        raise CheckpointError("a numpy array's shape does not fit its data")
    values = np.frombuffer(raw, dtype.value).reshape(shape, order=order)
    return values.astype(dtype.value.newbyteorder("="))  # a copy in the machine's byte order


class _Array(np.ndarray):
    """An array while it is unpickled: first empty, then with its state. numpy's own method gets only checked state."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        values = _array(shape, dtype, data, "F" if fortran_order else "C")
        super().__setstate__((1, values.shape, values.dtype, False, values.tobytes()))


def _empty_array(*_: object) -> _Array:
    return np.ndarray.__new__(_Array, (0,))


def _scalar(dtype: _Dtype, data: bytes | str) -> np.generic:
    return _array((1,), dtype, data, "C")[0]


def _array_from_buffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    return _array(shape, dtype, data, order)


_PYTHON = (dict, list, tuple, set, frozenset, int, float, bool, complex, str, bytes, bytearray, slice)
_ARRAYS = {"_reconstruct": _empty_array, "scalar": _scalar}
_FUNCTIONS: dict[str, dict[str, Callable]] = {
    "builtins": {**{kind.__name__: kind for kind in _PYTHON}, "getattr": _get_attribute},
    "collections": {"OrderedDict": OrderedDict, "Counter": dict, "defaultdict": lambda *_: {}},
    "_codecs": {"encode": _encode},
    "torch": {"Size": torch.Size, "device": torch.device},
    "torch._utils": {"_rebuild_tensor": _rebuild_tensor, "_rebuild_tensor_v2": _rebuild_tensor,
                     "_rebuild_parameter": _rebuild_parameter, "_rebuild_parameter_with_state": _rebuild_parameter},
    "torch._tensor": {"_rebuild_from_type_v2": _rebuild_from_type},
    "numpy": {"dtype": _Dtype},
    "numpy.core.multiarray": _ARRAYS,
    "numpy._core.multiarray": _ARRAYS,
    "numpy.core.numeric": {"_frombuffer": _array_from_buffer},
    "numpy._core.numeric": {"_frombuffer": _array_from_buffer},
}
_FUNCTIONS["__builtin__"] = _FUNCTIONS["builtins"]  # Python 2's name; protocols up to 2 still write it
_BUILDERS = {(module, name): _Builder(function) for module, table in _FUNCTIONS.items() for name,
             function in table.items()}

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip

# Used only as arguments of the builders above, which ignore them.
_TYPES = {("numpy", "ndarray"), ("torch", "Tensor"), ("torch._tensor", "Tensor"), ("torch.nn.parameter", "Parameter")}
_FRAMEWORKS = {"mmengine", "mmcv", "mmdet"}

# (dtype, key, number of elements, view) -> flat tensor
StorageReader = Callable[[torch.dtype, str, int, object], Tensor]


class CheckpointUnpickler(pickle.Unpickler):
    """Unpickles `file` within the limits above.

    `storage` returns the flat tensor of a torch storage; without it, the pickle must not contain storages. Strings from
    Python 2 are read as latin1, which maps every byte to one character and back.
    """

    def __init__(self, file: BinaryIO, storage: StorageReader | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self._placeholders: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILDERS:
            return _BUILDERS[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) in _TYPES or module.split(".")[0] in _FRAMEWORKS:
            # One class per file and name: a pickle can set attributes of a class, and these must not outlive the file.
            return self._placeholders.setdefault((module, name),
                                                 type("Placeholder", (_Placeholder,), {"__slots__": ()}))
        raise CheckpointError(f"refused, it asks for {one_line(f'{module}.{name}', 80)}, which weights do not need")

    def persistent_load(self, saved_id: object) -> Tensor:
        if self._storage is None or not isinstance(saved_id, tuple) or len(saved_id) < 5 or saved_id[0] != "storage":
            raise CheckpointError("it refers to data outside the pickle")
        _, dtype, key, _location, count, *view = saved_id
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int) or count < 0:
            raise CheckpointError("a storage has an impossible type or size")
        return self._storage(dtype, str(key), count, view[0] if view else None)
