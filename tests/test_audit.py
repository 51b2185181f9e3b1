"""The promises of the README that can be checked by reading the code: equation map, flags, imports, layout."""
import ast
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

METHODS = ["wise_ft", "lipsum_ft", "vrf", "drm"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def equation_map():
    """(equation, module, function) of each row of the README's equation map."""
    table = README.split("## Equation map")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    return [(row[1], *re.fullmatch(r"`(\w+)\.py:(\w+)`", row[2]).groups()) for row in rows]


def section(module, title):
    """Names of the functions between two banners of a method file."""
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    part = re.split(r"# -+ (.+?) -+ #?\n|# -+ (.+?) -+\n", text)
    body = part[part.index(title) + 1:]
    return re.findall(r"^def (\w+)", next(x for x in body if x), re.M)


def test_every_row_of_the_equation_map_names_a_function_that_says_so():
    rows = equation_map()
    assert len(rows) >= 20
    for equation, module, function in rows:
        docstring = inspect.getdoc(getattr(importlib.import_module(module), function))
        for name in re.split(r" and ", equation):
            assert name.lower() in docstring.lower().replace("\n", " "), (module, function, name)


@pytest.mark.parametrize("module", METHODS)
def test_no_equation_function_is_missing_from_the_map(module):
    mapped = {f for _, m, f in equation_map() if m == module}
    found = section(module, "Equations")
    assert found and set(found) <= mapped, set(found) - mapped


@pytest.mark.parametrize("module", METHODS)
def test_every_flag_is_read_and_documented(module):
    import common
    method = importlib.import_module(module)
    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "parse", lambda p, *_: recorded.append(p))
        method.get_args()
    p, source = recorded[0], inspect.getsource(common) + inspect.getsource(method)
    flags = set(p.defaults)
    read = {n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    read |= set(re.findall(r'getattr\(self\.args, "(\w+)"', source))
    assert flags <= read, flags - read
    recipe = {k for r in method.RECIPES.values() for k in r}
    assert recipe <= flags, recipe - flags
    text = " ".join(p.format_help().split())
    assert text.count("(default:") == len(flags)
    for data, r in method.RECIPES.items():  # a recipe or parse() gives every flag a value
        left = [f for f, v in p.defaults.items() if v is common.RECIPE and f not in r
                and f not in ("model", "holdout", "steps", "epochs", "baseline")]
        assert not left and ("steps" in r or "epochs" in r), (data, left)


@pytest.mark.parametrize("module", METHODS)
def test_a_method_imports_common_and_packages_only_and_its_equations_stand_alone(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"argparse", "contextlib", "copy", "functools", "json", "sys", "warnings", "pathlib", "numpy", "torch", "common"}, imported
    for n in tree.body:  # "copy a function": no equation needs common.py, args or a device
        if isinstance(n, ast.FunctionDef) and n.name in section(module, "Equations"):
            names = {x.id for x in ast.walk(n) if isinstance(x, ast.Name)}
            assert not names & {"common", "args", "setup", "np"}, (n.name, names)


def test_common_knows_no_method_and_the_top_level_is_as_designed():
    code = "\n".join(line.split("#")[0] for line in (ROOT / "common.py").read_text(encoding="utf-8").splitlines())
    assert not re.search(r"import (wise_ft|lipsum_ft|vrf|drm)\b", code)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    top = {Path(name).parts[0] for name in tracked} - {".ci", ".gitignore"}
    assert top == {"README.md", "requirements.txt", "LICENSE", "common.py", "tests", *(f"{m}.py" for m in METHODS)}
