"""The structure of the code: packages in one import order, no cycles, and the habits that keep files readable.

Everything is read from the source; nothing is imported or run.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import zero_ds
from zero_ds.training.stages import STAGES

PACKAGE = Path(zero_ds.__file__).parent

ORDER = (
    "runtime",
    "config",
    "data",
    "model",
    "trajectory",
    "training",
    "surrogate",
    "grafting",
    "evaluation",
    "export",
    "cluster",
    "cli",
)
"""A package imports only from itself and from packages before it. docs/architecture.md states the same order."""

TOP = ("__init__", "train")
"""Modules of the package's top level: the version, and the entry point of `deepspeed --module zero_ds.train`."""

CARRIED = "export.remote."
"""Files that are copied into exports and run where this package is not installed."""

STAND_IN = "export.remote.read_image"
"""Module in place of the one file that exports take from another package, data.read_image."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module: str) -> set[str]:
    """Modules of this package that `module` imports, at its top or inside a function, without the `zero_ds.`."""
    found = set()
    for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if (
                module.startswith(CARRIED) and module != STAND_IN
            ):  # they lie side by side in a folder of somebody else's
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


def test_the_listing_tells_the_method() -> None:
    """Every package has its place in the order, and there are few enough to be read at a glance."""
    present = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert present == {*ORDER, *TOP}
    assert len(present) <= 14


@pytest.mark.parametrize("module", [name for name in MODULES if name not in TOP])
def test_packages_import_only_earlier_packages(module: str) -> None:
    own = ORDER.index(module.partition(".")[0])
    for name in imports(module):
        assert ORDER.index(name.partition(".")[0]) <= own, f"{module} imports {name}, which comes later in ORDER"


def test_what_exports_take_from_training_needs_nothing_of_it() -> None:
    assert imports("data.read_image") == set() and "zero_ds" not in source("data.read_image").read_text()


def test_no_module_cycles() -> None:
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


def test_only_the_engine_initialises_deepspeed() -> None:
    callers = [
        m for m in MODULES if "deepspeed.initialize" in re.sub(r'""".*?"""', "", source(m).read_text(), flags=re.S)
    ]
    assert callers == ["training.engine"]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "training.stages"])
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


PRINTS = ("cli.", "cluster.")
"""Modules that write to standard output; all others log, or return text for a command to print."""


@pytest.mark.parametrize("module", MODULES)
def test_habits(module: str) -> None:
    assert not re.search(r"\butil(s|ities)?\b", module.rsplit(".", maxsplit=1)[-1]), f"{module}: name its purpose"
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{module} does not name its purpose"
    if module.startswith(PRINTS):
        return
    for node in ast.walk(tree):
        printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not printing, f"{module} prints in line {node.lineno}; log it, or return it to the command"


STATEMENTS, PARAMETERS = 50, 8
"""Most statements (nested ones included) and parameters of a function."""

FOREIGN_SIGNATURES = (
    "evaluation.suites.lmms_model",  # lmms-eval passes its options by name
    CARRIED,  # transformers calls configs, models and processors with the arguments of its own classes
)
"""Modules whose functions may have more parameters, since another library decides which."""

TOOLS = sorted((PACKAGE.parent / "tools").rglob("*.py"))


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Returns whether Typer calls the function, so that its parameters are the options of a command."""
    return any("typer." in ast.unparse(a.annotation) for a in function.args.args if a.annotation is not None)


@pytest.mark.parametrize(
    "path", [*map(source, MODULES), *TOOLS], ids=lambda path: str(path.relative_to(PACKAGE.parent))
)
def test_functions_can_be_read_at_once(path: Path) -> None:
    """No function is long or takes many parameters; no comprehension nests three loops, no conditional another."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removeprefix("zero_ds.")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1
            assert statements <= STATEMENTS, f"{where}: {node.name} has {statements} statements"
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            parameters = len([name for name in names if name not in ("self", "cls")])
            exempt = is_command(node) or f"{module}.".startswith(FOREIGN_SIGNATURES)
            assert exempt or parameters <= PARAMETERS, f"{where}: {node.name} has {parameters} parameters"
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            assert len(node.generators) <= 2, f"{where}: a comprehension with {len(node.generators)} loops"
        elif isinstance(node, ast.IfExp):
            assert not isinstance(node.body, ast.IfExp) and not isinstance(node.orelse, ast.IfExp), (
                f"{where}: a conditional expression inside another"
            )


def test_one_constructor_of_the_model() -> None:
    """Training, planning, evaluation and export build the model in one place."""
    callers = [m for m in MODULES if re.search(r"\bVisionLanguageModel\(", source(m).read_text(encoding="utf-8"))]
    assert sorted(callers) == ["model.build", "model.vlm"], "model.vlm defines the class, model.build makes it"


def test_one_table_of_safetensors_dtypes() -> None:
    """The names of safetensors' dtypes are written in one file."""
    named = [m for m in MODULES if re.search(r"""["']BF16["']""", source(m).read_text(encoding="utf-8"))]
    assert named == ["runtime.safetensors"]


def test_train_reads_aloud() -> None:
    """`train` tells a run in at most 25 statements, and the loop in at most 60 lines."""
    limits = {("training.train", "train"): (25, 999), ("training.loop", "loop"): (STATEMENTS, 60)}
    for (module, name), (statements, lines) in limits.items():
        tree = ast.parse(source(module).read_text(encoding="utf-8"))
        (function,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
        assert sum(isinstance(child, ast.stmt) for child in ast.walk(function)) - 1 <= statements, name
        assert function.end_lineno is not None and function.end_lineno - function.lineno + 1 <= lines, name


def test_every_package_is_installed() -> None:
    """pyproject.toml lists packages by hand; one that is missing there would be missing in a wheel."""
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'^  "(zero_ds[\w.]*)",$', text, flags=re.M)) - {"zero_ds.ds_configs"}
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    present = {".".join(["zero_ds", *folder.relative_to(PACKAGE).parts]) for folder in folders}
    assert present == listed


COUNTS_PATCHES = {
    "model.build",
    "model.vlm",
    "export.source",
    "training.planning.architecture",
    "training.planning.flops",
}
"""Modules that ask a vision encoder for the number of its patches: to count its own work, or for `image_tokens`."""


def test_one_place_counts_image_tokens() -> None:
    """`AdapterConfig.image_tokens` says how many positions an image takes; the patches alone do not."""
    asks = re.compile(r"(family|encoder_of\(.*\))\.tokens_per_image\(")
    found = {m for m in MODULES if asks.search(source(m).read_text(encoding="utf-8"))}
    assert {module for module in found if not module.startswith("model.encoders")} == COUNTS_PATCHES


ASKS_FOR_A_GPU = {"runtime.environment", "grafting.engines.vllm"}
"""Modules that may ask torch whether there is a GPU: the one that decides, and the one that serves vLLM, which chooses
its devices itself."""


def test_one_place_decides_which_device_is_used() -> None:
    asking = {module for module in MODULES if "cuda.is_available(" in source(module).read_text(encoding="utf-8")}
    assert asking == ASKS_FOR_A_GPU, "ask runtime.environment.has_cuda, or runtime.distributed.device"
