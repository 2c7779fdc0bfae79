"""Print what can be counted about the code's shape, and fail if a bound is passed.

towers: classes that exist only as the base of one other class.  any: parameters annotated `Any` or `object`, of all parameters.
twins: lines that are written by hand for threads and again for tasks.  comments: in 100 lines of `_protocol`.
public names: what a manager shows.  functions and files: median and 90th percentile of their lines.
"""

from __future__ import annotations

import ast
import itertools
import statistics
import sys
from collections import Counter
from pathlib import Path

from twins import PAIRS

ROOT = Path(__file__).resolve().parent.parent
PATHS = [path for path in sorted((ROOT / "txrpc").rglob("*.py")) if "_wire/v1" not in path.as_posix()]
TREES = {path: ast.parse(path.read_text()) for path in PATHS}
BOUNDS = {
    "towers": 1,
    "parameters that are Any or object, %": 4.0,
    "twin lines written by hand": 1110,
    "public names of the manager": 10,
    "median lines of a function": 5,
    "90th percentile of a function": 15,
    "median lines of a file": 140,
    "90th percentile of a file": 310,
}
"""At most so much; they may only shrink."""
COMMENTS_AT_LEAST = 5.0


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, kinds)]


def towers() -> list[str]:
    """Classes of ours that are the base of exactly one other, are made nowhere, and stand for nothing themselves."""
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = Counter(base.id for node in classes for base in node.bases if isinstance(base, ast.Name))
    names = Counter(node.id for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Name))
    return sorted(
        node.name
        for node in classes
        if bases[node.name] == 1 and names[node.name] == 1 and not any("Protocol" in ast.unparse(b) for b in node.bases)
    )


def loose_parameters() -> float:
    """Per cent of all parameters."""
    parameters = [
        ast.unparse(argument.annotation)
        for function in functions()
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None and argument.arg != "_"  # unused: one entry of a table like the others
    ]
    return 100 * sum(annotation in ("Any", "object") for annotation in parameters) / len(parameters)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without the docstring."""
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def public_names() -> int:
    """Of `TransactionManager`."""
    tree = TREES[ROOT / "txrpc" / "_client" / "manager.py"]
    (manager,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return len({n.name for n in manager.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")})


def twin_lines() -> int:
    """Lines of code in the synchronous halves of modules that are written twice."""
    written = {ROOT / pair.target for pair in PAIRS}
    halves = [path.with_name(path.name.replace("_async", "")) for path in PATHS if path.stem.endswith("_async")]
    return sum(len(path.read_text().splitlines()) for path in halves if path not in written)


def comment_share() -> float:
    """Comment lines, and lines of strings that document a field, in 100 lines of `_protocol`; docstrings do not count."""
    comments = total = 0
    for path in PATHS:
        if "_protocol" in path.parts:
            lines = path.read_text().splitlines()
            total += len(lines)
            comments += sum(line.lstrip().startswith("#") or "  # " in line for line in lines)
            comments += _documented_fields(TREES[path])
    return 100 * comments / total


def _documented_fields(tree: ast.Module) -> int:
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    return sum(
        (after.end_lineno or 0) - after.lineno + 1
        for body in bodies
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.Assign | ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    )


def main() -> int:
    """See the module's docstring; returns the exit code."""
    lengths = sorted(map(lines_of, functions()))
    files = sorted(len(path.read_text().splitlines()) for path in PATHS)
    figures: dict[str, float] = {
        "towers": len(towers()),
        "parameters that are Any or object, %": round(loose_parameters(), 1),
        "twin lines written by hand": twin_lines(),
        "public names of the manager": public_names(),
        "median lines of a function": statistics.median(lengths),
        "90th percentile of a function": lengths[len(lengths) * 9 // 10],
        "median lines of a file": statistics.median(files),
        "90th percentile of a file": files[len(files) * 9 // 10],
    }
    passed = [name for name, figure in figures.items() if figure > BOUNDS[name]]
    for name, figure in figures.items():
        print(f"{name:40} {figure:6} of at most {BOUNDS[name]}{'  <- too much' if name in passed else ''}")
    comments = round(comment_share(), 1)
    few = comments < COMMENTS_AT_LEAST
    print(
        f"{'comment lines in 100 lines of _protocol':40} {comments:6} of at least {COMMENTS_AT_LEAST}{'  <- too few' * few}"
    )
    if towers():
        print("towers:", ", ".join(towers()))
    return int(bool(passed) or few)


if __name__ == "__main__":
    sys.exit(main())
