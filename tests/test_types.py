"""Public functions have types for arguments and results, and the installed packages are marked as typed."""
import ast
import runpy

import pytest
import setuptools
from runs import ROOT

PACKAGES = ("kd", "models", "losses", "data", "scripts")


def functions(node: ast.AST):
    """Public functions of a module and of its public classes, with `__init__` and other special methods."""
    for child in ast.iter_child_nodes(node):
        special = getattr(child, "name", "").startswith("__")
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from functions(child)
        elif isinstance(child, ast.FunctionDef) and (special or not child.name.startswith("_")):
            yield child


def untyped(function: ast.FunctionDef) -> list[str]:
    """Names of a function's arguments without a type, and "return" if the result has no type."""
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
    return missing + ["return"] * (function.returns is None and not function.name.startswith("__"))


def test_an_untyped_function_is_seen():
    tree = ast.parse("class A:\n def f(self, a: int, *b): ...\n def __init__(self, c): ...\ndef _g(x): ...")
    assert [untyped(function) for function in functions(tree)] == [["b", "return"], ["c"]]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_are_typed(package):
    wrong, count = [], 0
    for path in sorted((ROOT / package).rglob("*.py")):
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            count += 1
            wrong += [f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {name}"
                      for name in untyped(function)]
    assert count > 10 and not wrong, "\n".join(wrong)


def test_what_is_installed(monkeypatch):
    """Every folder with code is installed, with the markers for typed packages."""
    said = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: said.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for package in PACKAGES if package != "scripts"
               for path in (ROOT / package).rglob("*.py")}
    assert set(said["packages"]) == folders and {"kd.engine", "models.heads"} <= folders
    marked = {package for package, files in said["package_data"].items() if "py.typed" in files}
    assert marked == {folder for folder in folders if "." not in folder}
    assert all((ROOT / package / "py.typed").is_file() for package in marked)
    others = {path for package in said["packages"] for path in (ROOT / package.replace(".", "/")).glob("*.*")
              if path.suffix != ".py" and path.is_file() and path.name != "py.typed"}
    taken = {path for package, patterns in said["package_data"].items() for pattern in patterns
             for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    assert others and others <= taken
