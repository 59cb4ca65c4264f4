"""No module of the package can run code that comes as data: what could is not even named there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_lora

PACKAGE = Path(qwen_lora.__file__).parent

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
ATTRIBUTES = {
    *("torch.load", "np.load", "numpy.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load"),
    *("yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("tarfile.extractall", "shutil.unpack_archive", "torch.hub.load", "torch.jit.load"),
    *("pandas.read_pickle", "code.interact", "ctypes.CDLL", "runpy.run_path", "runpy.run_module"),
}
METHODS = {"extract", "extractall", "load_state", "read_pickle"}  # whatever they belong to
KEYWORDS = {"shell": {False}, "trust_remote_code": {False}, "allow_pickle": {False}}
KEYWORDS |= {"weights_only": {True}, "use_safetensors": {True}}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute, as far as it is names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def banned(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in MODULES or name in ATTRIBUTES:
                yield f"line {node.lineno}: import of {name}"
        if isinstance(node, ast.Name) and node.id in NAMES:
            yield f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.Attribute) and dotted(node) in ATTRIBUTES:
            yield f"line {node.lineno}: {dotted(node)}"
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield f"line {node.lineno}: {dotted(node.func)}()"
            for keyword in node.keywords:
                allowed = KEYWORDS.get(keyword.arg or "")
                value = keyword.value
                if allowed and not (isinstance(value, ast.Constant) and value.value in allowed):
                    yield f"line {node.lineno}: {keyword.arg}={ast.unparse(value)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_package_names_nothing_that_runs_data(path: Path) -> None:
    assert list(banned(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import marshal as m"),
        *("eval(x)", "exec(x)", "f = eval", "__import__(x)", "compile(x, y, z)"),
        *("torch.load(x)", "f = torch.load", "from torch import load", "yaml.load(x)"),
        *("yaml.load(x, Loader=yaml.Loader)", "os.system(x)", "np.load(x)"),
        *("subprocess.run(x, shell=True)", "run(x, shell=flag)", "tar.extractall(x)"),
        *("load(x, trust_remote_code=True)", "load(x, weights_only=False)"),
    ],
)
def test_the_search_finds_them(source: str) -> None:
    assert list(banned(source))


def test_children_are_started_only_where_ranks_are() -> None:
    starts = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(
            isinstance(node, ast.Import | ast.ImportFrom)
            and ("subprocess" in ast.unparse(node) or "multiprocessing" in ast.unparse(node))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert starts <= {"launch.py"}
