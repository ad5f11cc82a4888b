"""The house: who may import whom, and the habits that keep it readable. Read from the source, nothing is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import zero_ds
from zero_ds.stages import STAGES

PACKAGE = Path(zero_ds.__file__).parent

FLOORS: dict[str, int] = {
    # 0: what everything stands on
    "__init__": 0,
    "config": 0,
    "failure": 0,
    "distributed": 0,
    "ports": 0,
    "console": 0,
    "monitor": 0,
    "hub": 0,
    "files": 0,
    "tensor_stream": 0,
    "torch_files": 0,
    # 1: one module a model family
    "families": 1,
    "encoders": 1,
    # 2: measuring and cutting the target, data
    "trajectory": 2,
    "transition": 2,
    "surrogate": 2,
    "pretrained": 2,
    "shards": 2,
    "lens": 2,
    "streaming": 2,
    "gguf": 2,
    "data": 2,
    # 3: the model
    "losses": 3,
    "vocabulary": 3,
    "model": 3,
    "kernels": 3,
    "quantized": 3,
    "distill": 3,
    "lora": 3,
    "compilation": 3,
    # 4: what trains when
    "stages": 4,
    # 5: training
    "deepspeed_config": 4,
    "optimizer_state": 3,
    "cost": 4,
    "blueprint": 4,
    "engine": 5,
    "prepare": 5,
    "plan.activations": 4,
    "plan.architecture": 4,
    "plan.memory": 4,
    "plan.recompute": 5,
    "preview": 5,
    "checkpoint": 5,
    "peft_folder": 5,
    "results": 5,
    "train": 5,
    # 6: what is done with a result
    "warmup": 6,
    "graft": 6,
    "released": 6,
    "consolidate": 6,
    "export": 6,
    "decoding": 6,
    "generate": 6,
    "named_model": 6,
    "chat": 6,
    "answer_trajectory": 6,
    "offload": 6,
    "vllm_engine": 6,
    "audit": 6,
    "evaluation": 6,
    "report": 6,
    "plan": 6,
    "nodes": 6,
    "selftest": 6,
    "doctor": 6,
    # 7: people
    "page": 7,
    "pipeline": 7,
    "launcher": 7,
    "commands": 7,
    "cli": 7,
    "__main__": 7,
}
"""Module or package -> floor; a package's entry covers what is in it, unless a longer name has its own."""

SHIPPED = "export.remote."
"""Modules that are copied into exports, where this package is not."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def floor(module: str) -> int | None:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in FLOORS:
            return FLOORS[name]
    return None


def imports(module: str) -> set[str]:
    """Modules of this package that `module` imports, at its top or inside a function, without the `zero_ds.`.

    What a module imports when it is run as a program (`python -m`) does not count: then it is its own top floor.
    """
    found = set()
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__name__" in ast.unparse(n.test))]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if module.startswith(SHIPPED):  # its files lie side by side in a folder of somebody else's
                assert node.level < 2 and not str(node.module).startswith("zero_ds"), f"{module}, line {node.lineno}"
                continue
            assert node.level == 0, f"{module} imports relatively in line {node.lineno}; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        for name in names:
            inner = name.removeprefix("zero_ds.")
            if name.startswith("zero_ds.") and inner in MODULES:
                found.add(inner)
    # `from zero_ds.data.loader import X` names zero_ds.data as well; only the deepest module counts
    return {name for name in found if not any(other.startswith(name + ".") for other in found)} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    own = floor(module)
    assert own is not None, f"zero_ds/{module} stands on no floor; give it one in FLOORS"
    for name in imports(module):
        below = floor(name)
        assert below is not None and below <= own, f"{module} (floor {own}) imports {name} (floor {below})"


def test_no_circular_imports() -> None:
    graph = {module: imports(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circular import: {' -> '.join((*path, module))}"
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_every_floor_is_in_use() -> None:
    stale = [name for name in FLOORS if not any(m == name or m.startswith(name + ".") for m in MODULES)]
    assert not stale, f"FLOORS names modules that are gone: {stale}"


def test_only_the_engine_initialises_deepspeed() -> None:
    callers = [
        m for m in MODULES if "deepspeed.initialize" in re.sub(r'""".*?"""', "", source(m).read_text(), flags=re.S)
    ]
    assert callers == ["engine"]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "stages"])
def test_only_stages_knows_stages_by_name(module: str) -> None:
    """Nobody else asks which stage it is: what differs between stages is in the stage table."""
    for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {
                constant.value for side in sides for constant in ast.walk(side) if isinstance(constant, ast.Constant)
            }
            asked = any("stage" in ast.unparse(side) for side in sides)
            assert not (asked and names & set(STAGES)), f"{module} line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", MODULES)
def test_size_and_habits(module: str) -> None:
    text = source(module).read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{module} has {text.count(chr(10))} lines; 400 is the limit"
    assert not re.search(r"\butil(s|ities)?\b", module.rsplit(".", maxsplit=1)[-1]), f"{module}: say what it is for"
    tree = ast.parse(text)
    assert module == "__main__" or not tree.body or ast.get_docstring(tree), f"{module} does not say what it is for"
    if floor(module) == 7:
        return
    for node in ast.walk(tree):
        printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not printing, f"{module} prints in line {node.lineno}; log it, or return it to the command"


def test_every_package_is_installed() -> None:
    """pyproject.toml lists packages by hand; one that is missing there would be missing in a wheel."""
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'^  "(zero_ds[\w.]*)",$', text, flags=re.M)) - {"zero_ds.ds_configs"}
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    present = {".".join(["zero_ds", *folder.relative_to(PACKAGE).parts]) for folder in folders}
    assert present == listed
