"""Promises that are checked by reading the code: equation map, flags, imports, layout."""
import ast
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import common
from tests.conftest import METHODS, ROOT, args_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
STANDARD = {"copy", "dataclasses", "pathlib", "sys", "typing"}


def equation_map():
    """(equation, module, function) of each row of the README's equation map."""
    table = README.split("## Equation map")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    # A formula may hold \|, as in p(y\|x), which does not end a cell.
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                        for line in lines]
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    return [(row["equation"], *re.fullmatch(r"`(\w+)\.py:(\w+)`", row["here"]).groups())
            for row in rows]


def section(module, title):
    """Names of the functions between two banners of a method file."""
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    parts = re.split(r"^# -+ (.+?) -+\n", text, flags=re.M)
    return re.findall(r"^def (\w+)", parts[parts.index(title) + 1], re.M)


def test_every_row_of_the_equation_map_names_a_function_that_says_so():
    rows = equation_map()
    assert len(rows) >= 20
    for equation, module, function in rows:
        docstring = inspect.getdoc(getattr(importlib.import_module(module), function))
        for name in re.split(r" and ", equation):
            words = " ".join(docstring.lower().split())
            assert name.lower() in words, (module, function, name)


@pytest.mark.parametrize("module", METHODS)
def test_no_equation_function_is_missing_from_the_map(module):
    mapped = {f for _, m, f in equation_map() if m == module}
    found = section(module, "Equations")
    assert found and set(found) <= mapped, set(found) - mapped


@pytest.mark.parametrize("module", METHODS)
def test_every_flag_is_read_and_documented(module, monkeypatch):
    method, parser, made = importlib.import_module(module), common.parser, []
    monkeypatch.setattr(common, "parser", lambda doc: made.append(parser(doc)) or made[-1])
    for data in common.DATA:
        args, own = args_of(f"{module}.py", "--data", data), common.OF_DATA.get(data, {})
        assert {**method.RECIPES[data], **own}.items() <= vars(args).items(), data
    flags = made[-1].defaults.keys() - {"help"}
    source = inspect.getsource(common) + inspect.getsource(method)
    read = {node.attr for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    assert flags <= read, flags - read
    assert {flag for recipe in method.RECIPES.values() for flag in recipe} <= flags
    described = {action.dest for action in made[-1]._actions if len(action.help) > 7}
    assert flags <= described, flags - described


@pytest.mark.parametrize("module", METHODS)
def test_a_method_imports_common_and_packages_and_its_equations_stand_alone(module):
    tree, imported = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("open_clip"):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    allowed = STANDARD | {"numpy", "torch", "common"}
    if module == "drm":  # FLYP's loss is over the batch of all ranks
        allowed.add("open_clip.loss.gather_features")
    assert imported <= allowed, imported - allowed
    for node in tree.body:  # "copy a function": no equation needs common.py, args or a device
        if isinstance(node, ast.FunctionDef) and node.name in section(module, "Equations"):
            names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
            assert not names & {"common", "args", "setup", "np"}, (node.name, names)


def test_common_has_the_parts_that_its_header_names():
    text = (ROOT / "common.py").read_text(encoding="utf-8")
    named = re.findall(r"^ +(Part \d)  (\w+)", common.__doc__, re.M)
    banners = re.findall(r"^# =+ (Part \d): (\w+)", text, re.M)
    assert [(part, word.lower()) for part, word in named] == banners and len(banners) == 4
    for name in re.findall(r"^ {4}([a-z_]+)  ", common.__doc__, re.M):
        assert callable(getattr(common, name))


def test_common_knows_no_method_and_the_top_level_is_as_designed():
    code = re.sub("#.*", "", (ROOT / "common.py").read_text(encoding="utf-8"))
    assert not re.search(r"import (wise_ft|lipsum_ft|vrf|drm)\b", code)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    top = {Path(name).parts[0] for name in listed.stdout.splitlines()}
    top -= {".ci", ".github", ".gitignore", ".ruff.toml"}
    assert top == {"README.md", "requirements.txt", "LICENSE", "common.py", "tests",
                   *(f"{method}.py" for method in METHODS)}
