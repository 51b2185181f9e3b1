"""What the README shows is run: its examples, its lines for inference, and its results table."""
import contextlib
import importlib
import io
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, run, write_tree

README = (ROOT / "README.md").read_text(encoding="utf-8")


def examples(title):
    """The python blocks of a section."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.mark.parametrize("block", examples("Copy a function"))
def test_examples_of_functions_to_copy_run_as_they_stand(block):
    found = {}
    exec(block, found)
    module = re.search(r"from (wise_ft|lipsum_ft|vrf|drm) import", block)[1]
    if module == "wise_ft":
        middle = (found["zero_shot"].weight + found["fine_tuned"].weight) / 2
        assert torch.allclose(found["average"].weight, middle)
    elif module == "lipsum_ft":
        assert 0 <= found["r"].item() < 1e-6  # the two towers are the same
    else:
        assert torch.allclose(found["p"].sum(dim=1), torch.ones(len(found["p"])))
    if module == "drm":
        assert torch.allclose(found["p_c"].sum(dim=1), torch.ones(16))


def test_there_is_an_example_for_every_method():
    text = "".join(examples("Copy a function"))
    assert all(f"from {name} import" in text for name in ("wise_ft", "lipsum_ft", "vrf", "drm"))


def test_the_papers_commands_are_understood(monkeypatch):
    found = re.findall(r"(wise_ft|lipsum_ft|vrf|drm)\.py ([^`#\n]*--data [^`#(\n]*)", README)
    assert len(found) >= 15
    for method, flags in found:
        words = re.sub(r"\$\w+|\b[AB]\b", "1", flags).split()
        if "NAME" not in flags and "..." not in flags:
            monkeypatch.setattr("sys.argv", [f"{method}.py", *words])
            importlib.import_module(method).get_args()


def test_six_lines_classify_an_image_as_predict_does(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=8, test=2)
    run("wise_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 4,
        "--batch-size", 8, "--alphas", 1, "--workers", 0, "--out", "w", cwd=tmp_path)
    image = tree / "test" / "blue_square" / "000.jpg"
    [block] = examples("Your own images")
    code = block.replace("RUN", str(tmp_path / "w")).replace("IMAGE", str(image))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    command = [sys.executable, str(ROOT / "wise_ft.py"), "--finetuned", str(tmp_path / "w"),
               "--predict", str(image.parent)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    path, name, probability = lines[1].split("\t")
    shown = out.getvalue().split()
    assert path == str(image) and " ".join(shown[:-1]) == name
    assert float(shown[-1]) == pytest.approx(float(probability), abs=1e-4)


def test_results_are_those_of_the_committed_scores():
    command = [sys.executable, str(ROOT / "tests/results.py"), "--from",
               str(ROOT / "tests/results.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("\n## ") == 2
    main, other = printed.split("\n## ")[1:]
    for line in main.splitlines()[1:]:
        assert line in README, line
    paragraph = README.split("Nothing was tuned on another pre-training")[1].split("\n")[0]
    for number in re.findall(r"\d+%|[+-]\d+\.\d", paragraph):
        assert number in other, number
