"""Finds errors of a configuration before PyTorch is imported, which takes seconds.

The signatures of the components say what a configuration may contain, and their modules import PyTorch. Here they are
imported with empty stand-ins in its place, only to read the signatures, and are forgotten afterwards.
"""
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

SLOW = ("torch", "torchvision", "pycocotools")  # packages with a stand-in
OURS = ("kd", "models", "losses", "data")


class StandIn(ModuleType):
    """A module, function or constant of PyTorch that does nothing.

    Its names with a capital letter are empty classes, to inherit from; the others are stand-ins again.
    """

    __path__ = ()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name.strip("_")[:1].isupper() else StandIn(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: object, **kwargs: object) -> object:
        return args[0] if args and callable(args[0]) else self  # as a decorator, it returns the function

    def __or__(self, other: object) -> object:  # in type hints
        return self


class Finder:
    """An import hook that finds stand-ins for the slow packages."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in SLOW else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module is complete."""


@contextmanager
def stand_ins() -> Iterator[None]:
    """A context in which modules are imported with stand-ins. All of them are forgotten at its end."""
    there, finder = set(sys.modules), Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - there:
            if name.partition(".")[0] in SLOW + OURS:
                del sys.modules[name]
                package, _, module = name.rpartition(".")
                if package in there:
                    with suppress(AttributeError):
                        delattr(sys.modules[package], module)


def check_early(path: str | Path | None, overrides: Sequence[str], needed: Sequence[str] = (),
                checkpoint: str | Path | None = None) -> None:
    """Check a configuration, and that the files exist which it names, if PyTorch is not imported yet.

    Args:
        path, overrides: as in `load_config`; without a path, the configuration of a published checkpoint (`zoo:NAME`),
            or none: the one in a file is not read here.
        needed: as in `check_files`.
        checkpoint: another file that is needed.
    Raises what the full check raises.
    """
    early("kd.early", "_check", path, overrides, needed, checkpoint)


def _check(path: str | Path | None, overrides: Sequence[str], needed: Sequence[str],
           checkpoint: str | Path | None) -> None:
    if path is None:
        import_module("models.checkpoints.sources").check_file(checkpoint)
        path = import_module("models.checkpoints.zoo").published_config(checkpoint)
    if path is not None:
        import_module("kd.checks").check_files(import_module("kd.config").load_config(path, overrides), needed,
                                              checkpoint)


def early(module: str, function: str, *arguments: object) -> None:
    """Call a function of ours that checks something, with stand-ins, if PyTorch is not imported yet.

    Raises what the function raises. An error that is not ours says nothing: the full check then decides.
    """
    if "torch" in sys.modules:
        return
    with stand_ins():
        try:
            getattr(import_module(module), function)(*arguments)
        except Exception as error:
            if getattr(error, "exit_code", 0):
                raise
