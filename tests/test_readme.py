"""What the README shows is run: its examples, its commands, and its results table. Its lines for
inference are run by tests/test_run.py."""
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import METHODS, ROOT, args_of

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
    assert all(f"from {name} import" in text for name in METHODS)


def test_the_papers_commands_are_understood():
    found = re.findall(r"(wise_ft|lipsum_ft|vrf|drm)\.py ([^`#\n]*--data [^`#(\n]*)", README)
    assert len(found) >= 15
    for method, flags in found:
        words = re.sub(r"\$\w+|\b[AB]\b", "1", flags).split()
        if "NAME" not in flags and "..." not in flags:
            args_of(f"{method}.py", *words)


def test_results_are_those_of_the_committed_scores():
    command = [sys.executable, "tests/results.py", "--from", "tests/results.json"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout
    assert printed.count("\n## ") == 2
    main, other = printed.split("\n## ")[1:]
    for line in main.splitlines()[1:]:
        assert line in README, line
    paragraph = README.split("Nothing was tuned on another pre-training")[1].split("\n")[0]
    for number in re.findall(r"\d+%|[+-]\d+\.\d", paragraph):
        assert number in other, number
