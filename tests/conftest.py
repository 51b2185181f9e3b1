"""Small models and image trees for the tests, and a way to run a method as a user does."""
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

COLOURS = {"red_square": (220, 30, 30), "green_square": (30, 200, 30), "blue_square": (40, 40, 220)}


def save_clip(path, config, seed=0):
    """A CLIP with random weights as an open_clip local directory."""
    torch.manual_seed(seed)
    path.mkdir(parents=True)
    common.save_tensors(path / "open_clip_model.safetensors", open_clip.CLIP(**config).state_dict())
    common.write_json(path / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    return f"local-dir:{path}"


TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    vision = dict(image_size=32, patch_size=8, width=64, head_width=32, layers=2)
    return save_clip(tmp_path_factory.mktemp("vit") / "m", dict(embed_dim=32, vision_cfg=vision, text_cfg=TEXT))


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory):
    vision = dict(image_size=32, layers=[1, 1, 1, 1], width=8, patch_size=None)
    return save_clip(tmp_path_factory.mktemp("rn") / "m", dict(embed_dim=32, vision_cfg=vision, text_cfg=TEXT))


def write_tree(root, train=20, test=10, size=40, seed=0):
    """A folder data set of JPEGs: three classes told apart by colour, one shift in which all is darker."""
    rng = np.random.default_rng(seed)
    for split, n, light in (("train", train, 1.0), ("test", test, 1.0), ("shifts/dark", test, 0.4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = light * (np.array(colour) + rng.normal(0, 25, (size, size, 3)))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg")
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script, *flags, cwd=None):
    """Run a method to its end in a process of its own; returns its results.json."""
    done = subprocess.run(command(script, *flags), cwd=cwd, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    out = next(flags[i + 1] for i, f in enumerate(flags) if f in ("--out", "--resume"))
    return json.loads((Path(cwd or ".") / out / "results.json").read_text())


def complaint(script, *flags):
    """The line that a method ends with on a mistake, having checked the exit code; in this process, to be quick."""
    method, stderr = importlib.import_module(script.removesuffix(".py")), io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            common.cli(method.main)
    lines = stderr.getvalue().strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), stderr.getvalue()
    return lines[0]
