"""An unpickler for checkpoints from other people. It builds only tensors, arrays and plain containers.

A pickle is a program. It reaches code in only one way: it asks for a global by module and name (`find_class`) and calls
the result. Here every global comes from the tables below, which contain this module's own builders. The pickle never
gets a class, function or module of the process. So a pickle can do three things with a global:
- call a builder of `_BUILDERS`, which makes plain data from plain data;
- name a storage type or a dtype, which are constants;
- use a placeholder for a class of a training framework (for example a logging buffer), which stores and does nothing.
Any other global raises `CheckpointError` with its name.

pickle also changes objects that it has built. `CheckpointUnpickler` lets it change only dicts, lists, sets and this
module's own objects: a tensor's own `__setstate__` would let a file read memory beyond the tensor. Dict keys and set
members are text, numbers or short tuples of them, because the hash of nested tuples can take forever. All calls
together get no more data than the file could hold, so a small file cannot fill the memory.
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

from data.errors import one_line


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is not safe to read, or does not fit the model. The message is one line."""

    exit_code = 2


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
    numbers = (offset, *size, *stride)
    # Only Python's integers: numpy's would overflow in the sums below.
    if len(size) != len(stride) or not all(type(number) is int for number in numbers) or min(numbers) < 0:
        raise CheckpointError("a tensor has an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(size) and last >= storage.numel():
        raise CheckpointError("a tensor reaches outside its storage")
    if math.prod(size) > max(storage.numel(), 2 ** 20):  # strides of zero repeat values
        raise CheckpointError("a tensor is larger than its storage")
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


def _key(key: object) -> object:
    """A key of a dict or a member of a set, if its hash is quick to compute."""
    parts = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
    if not all(isinstance(part, _KEYS) for part in parts):
        raise CheckpointError(f"a {type(key).__name__} is a key in a dict: keys must be text or numbers")
    return key


_KEYS = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, _Placeholder)


def _pairs(kind: type) -> Callable:
    def make(items: object = (), *_: object) -> dict:
        pairs = items.items() if isinstance(items, dict) else items
        return kind((_key(key), value) for key, value in pairs)
    return make


def _members(kind: type) -> Callable:
    return lambda items=(): kind(map(_key, items))


def _from(kind: type, *sources: type) -> Callable:
    """`kind` made from objects of the given types: an integer would make as many zero bytes, for example."""
    def make(*args: object) -> object:
        if not all(isinstance(arg, sources) for arg in args):
            raise CheckpointError(f"it makes a {kind.__name__} from a {type(args[0]).__name__}")
        if any(isinstance(arg, str) and arg not in _ENCODINGS for arg in args[1:]):
            raise CheckpointError(f"it makes a {kind.__name__} with the encoding {one_line(args[1], 40)}")
        return kind(*args)
    return make


_ENCODINGS = ("latin1", "latin-1", "ascii", "utf-8")  # idna and punycode take hours for a long text
_NUMBERS = (int, float, complex, str, np.generic)
_PYTHON = {
    "dict": _pairs(dict), "set": _members(set), "frozenset": _members(frozenset),
    "list": _from(list, list, tuple, set, frozenset, bytes), "tuple": _from(tuple, list, tuple, set, frozenset, bytes),
    "int": _from(int, *_NUMBERS), "float": _from(float, *_NUMBERS), "bool": _from(bool, *_NUMBERS),
    "complex": _from(complex, *_NUMBERS), "str": _from(str, str, bytes), "slice": _from(slice, int, type(None)),
    "bytes": _from(bytes, bytes, bytearray, list, str), "bytearray": _from(bytearray, bytes, bytearray, list, str)}
_ARRAYS = {"_reconstruct": _empty_array, "scalar": _scalar}
_FUNCTIONS: dict[str, dict[str, Callable]] = {
    "builtins": {**_PYTHON, "getattr": _get_attribute},
    "collections": {"OrderedDict": _pairs(OrderedDict), "Counter": _pairs(dict), "defaultdict": lambda *_: {}},
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


_CHANGEABLE = (_Builder, _Placeholder, _Dtype, _Array)  # they check their state, or refuse it


class CheckpointUnpickler(pickle._Unpickler):  # Python's own implementation, whose steps can be checked one by one
    """Unpickles `file` within the limits above.

    `storage` returns the flat tensor of a torch storage; without it, the pickle must not contain storages. Strings from
    Python 2 are read as latin1, which maps every byte to one character and back.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, size: int, storage: StorageReader | None = None) -> None:
        """`size` is that of the whole file, in bytes."""
        super().__init__(file, encoding="latin1")
        self._file_read = lambda count: file.read(min(count, size))  # makes no room for more than there is
        self._storage = storage
        self._left = 2 ** 20 + 16 * size  # items and bytes that calls may get
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

    def _call(self, function: Callable, args: tuple) -> object:
        self._left -= sum(1 + (len(arg) if hasattr(arg, "__len__") and not isinstance(arg, Tensor) else 0)
                          for arg in args)
        if self._left < 0:
            raise CheckpointError("its objects are larger than the file")
        return function(*args)

    def load_bytearray8(self) -> None:
        self.load_binbytes8()  # reads what there is, where pickle's own would first make as many zero bytes as it says
        self.stack[-1] = bytearray(self.stack[-1])

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _instantiate(self, function: Callable, args: list) -> None:
        self.append(self._call(function, tuple(args)))

    def load_build(self) -> None:
        if isinstance(self.stack[-2], OrderedDict):  # a state dict's attribute `_metadata`
            self.stack.pop()
        elif isinstance(self.stack[-2], _CHANGEABLE):
            super().load_build()
        else:
            raise CheckpointError(f"it tries to change a {type(self.stack[-2]).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self._set_items({}, items)
        self.append(dict(zip(items[::2], items[1::2])))

    @staticmethod
    def _set_items(owner: object, items: list) -> None:
        if not isinstance(owner, (dict, _Placeholder)):
            raise CheckpointError(f"it tries to change a {type(owner).__name__}")
        for key, value in zip(items[::2], items[1::2]):
            owner[_key(key)] = value

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], (set, _Placeholder)):
            raise CheckpointError(f"it tries to change a {type(self.stack[-1]).__name__}")
        for item in items:
            self.stack[-1].add(_key(item))

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # before `append`, which belongs to the stack below the mark
        self.append(frozenset(map(_key, items)))

    for _opcode, _step in ((pickle.REDUCE, load_reduce), (pickle.BUILD, load_build), (pickle.SETITEM, load_setitem),
                           (pickle.SETITEMS, load_setitems), (pickle.DICT, load_dict),
                           (pickle.ADDITEMS, load_additems), (pickle.FROZENSET, load_frozenset),
                           (pickle.BYTEARRAY8, load_bytearray8)):
        dispatch[_opcode[0]] = _step

    def persistent_load(self, saved_id: object) -> Tensor:
        if self._storage is None or not isinstance(saved_id, tuple) or len(saved_id) < 5 or saved_id[0] != "storage":
            raise CheckpointError("it refers to data outside the pickle")
        _, dtype, key, _location, count, *view = saved_id
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int) or count < 0:
            raise CheckpointError("a storage has an impossible type or size")
        return self._storage(dtype, str(key), count, view[0] if view else None)
