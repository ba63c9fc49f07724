"""Copies of the project's modules for a folder of weights, made from their import statements.

transformers runs the code of a folder only from files that lie directly in it and import each other as `from .name
import`. So `model/vlm/llava.py` becomes `model_vlm_llava.py`, the same text with other import statements:

    from model.vlm.base import VLMS           from .model_vlm_base import VLMS
    from utils import dist                    from . import utils_dist as dist
    from systems import gsva, lisa            only those that the assistant has, where a package registers its modules
    if TYPE_CHECKING: ...                     nothing
    (in a function) import cv2                the same inside `try`: transformers asks for packages outside one
    (in a function) from model.finetune ...   an ImportError, where the module is not among the copies

What a function imports is not followed: it belongs to training, or to files that answering does not read.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("utils", "data", "model", "systems", "evaluation")
# Packages that come with transformers, and Pillow. transformers refuses a folder whose files need others.
AVAILABLE = frozenset(
    ("torch", "transformers", "numpy", "PIL", "yaml", "tqdm", "safetensors", "tokenizers", "huggingface_hub")
)


@dataclass(frozen=True)
class Statement:
    """An import statement. typing: it is for type checkers only. later: a function runs it. guarded: inside a `try`."""

    node: ast.Import | ast.ImportFrom
    typing: bool = False
    later: bool = False
    guarded: bool = False


def copies(roots: Collection[str]) -> dict[str, str]:
    """File name -> text of the modules `roots` and of all that they import when they are imported.

    roots: names like `model.vlm.llava`. Of the modules that a package imports only to register them, those in `roots`
    are kept; all, if none is.
    """
    modules: dict[str, set[str]] = {}
    left = sorted(roots)
    while left:
        module = left.pop()
        if module not in modules:
            modules[module] = _needed(module, roots)
            left += sorted(modules[module])
    texts = {flat(module): _copy(module, modules.keys(), roots) for module in sorted(modules)}
    if len(texts) < len(modules):
        raise ValueError(f"two modules have the same flat name: {sorted(modules)}")
    return {f"{name}.py": text for name, text in texts.items()}


def flat(module: str) -> str:
    """`model.vlm.llava` -> `model_vlm_llava`."""
    return module.replace(".", "_")


def source_of(module: str) -> Path | None:
    """The file of a module or package of the project; None of any other name."""
    place = ROOT.joinpath(*module.split("."))
    for file in (place / "__init__.py", place.with_suffix(".py")):
        if module.split(".")[0] in PACKAGES and file.is_file():
            return file
    return None


def _needed(module: str, roots: Collection[str]) -> set[str]:
    """The project's modules that a module imports when it is imported."""
    tree = _parse(module)
    wanted: set[str] = set()
    for statement in _statements(tree):
        if not statement.typing and not statement.later:
            wanted |= {target for target, _ in _targets(module, tree, statement.node, roots)}
    return wanted


@cache
def _parse(module: str) -> ast.Module:
    file = source_of(module)
    if file is None:
        raise ValueError(f"{module} is no module of {', '.join(PACKAGES)}")
    return ast.parse(file.read_text(encoding="utf-8"))


def _statements(node: ast.AST, typing: bool = False, later: bool = False, guarded: bool = False) -> Iterator[Statement]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield Statement(child, typing, later, guarded)
        else:
            yield from _statements(
                child,
                typing or _for_type_checkers(child),
                later or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
                guarded or isinstance(child, ast.Try),
            )


def _for_type_checkers(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING`, which has no else in this project."""
    return isinstance(node, ast.If) and not node.orelse and ast.unparse(node.test) == "TYPE_CHECKING"


def _targets(
    module: str, tree: ast.Module, node: ast.Import | ast.ImportFrom, roots: Collection[str]
) -> list[tuple[str, ast.alias]]:
    """(module of the project, what is taken from it) of an import statement; [] of packages from elsewhere.

    Where the alias is a module itself, it is that module. Those that a package only registers are left out.
    """
    if isinstance(node, ast.Import):
        if any(source_of(alias.name) for alias in node.names):
            raise ValueError(f"{module}, line {node.lineno}: write `from package import module`")
        return []
    if node.level or not node.module:
        raise ValueError(f"{module}, line {node.lineno}: relative imports are not copied")
    if source_of(node.module) is None:
        return []
    pairs = [(f"{node.module}.{alias.name}", alias) for alias in node.names]
    targets = [(name if source_of(name) else node.module, alias) for name, alias in pairs]
    if node.module == module:  # a package's own modules
        used = {name.id for name in ast.walk(tree) if isinstance(name, ast.Name)}
        registered = {name for name, alias in targets if alias.name not in used}
        chosen = registered & set(roots) or registered
        targets = [(name, alias) for name, alias in targets if name not in registered - chosen]
    return targets


def _copy(module: str, modules: Collection[str], roots: Collection[str]) -> str:
    """The text of a module with its import statements for a flat folder."""
    file, tree = source_of(module), _parse(module)
    assert file is not None
    lines = file.read_text(encoding="utf-8").splitlines()
    changes: list[tuple[ast.stmt, list[str]]] = [
        (node, ["# (imports for type checkers)"])
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and _for_type_checkers(node)
    ]
    for statement in _statements(tree):
        if not statement.typing and (new := _rewritten(module, tree, statement, modules, roots)) is not None:
            changes.append((statement.node, new))
    for node, new in sorted(changes, key=lambda change: change[0].lineno, reverse=True):
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in new]
    where = file.relative_to(ROOT).as_posix()
    text = "\n".join([f"# A copy of {where} with other import statements. Apache-2.0", *lines]) + "\n"
    ast.parse(text)
    return text


def _rewritten(
    module: str, tree: ast.Module, statement: Statement, modules: Collection[str], roots: Collection[str]
) -> list[str] | None:
    """The lines that take the place of an import statement; None where it stays."""
    node = statement.node
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return None
    if isinstance(node, ast.Import) or source_of(node.module or "") is None:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        strange = {name.split(".")[0] for name in names} - AVAILABLE - sys.stdlib_module_names
        if not strange or statement.guarded:
            _targets(module, tree, node, roots)  # raises for forms that are not copied
            return None
        if not statement.later:
            raise ValueError(
                f"{module}, line {node.lineno} imports {', '.join(sorted(strange))}, which not everybody has who has "
                "transformers: import it in the function that needs it"
            )
        return ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]
    targets = _targets(module, tree, node, roots)
    if absent := sorted({name for name, _ in targets} - set(modules)):
        return [f'raise ImportError("{", ".join(absent)} is not among the files of this folder: use the project")']
    lines, taken = [], defaultdict(list)
    for name, alias in targets:
        if source_of(f"{node.module}.{alias.name}"):
            lines.append(f"from . import {flat(name)} as {alias.asname or alias.name}")
        else:
            taken[name].append(ast.unparse(alias))
    return lines + [f"from .{flat(name)} import {', '.join(names)}" for name, names in taken.items()]
