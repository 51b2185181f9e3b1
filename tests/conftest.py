"""Small models and image trees for the tests, and ways to run a method as a user does."""
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

# Before torch is imported: on a machine with a GPU the tests compute what they compute elsewhere.
# TEST_GPU=1 shows the GPU to tests/test_gpu.py.
if not os.environ.get("TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# One thread here as in the processes that tests start: sums of two threads have other digits.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

METHODS = ["wise_ft", "lipsum_ft", "vrf", "drm"]
SCRIPTS = [f"{method}.py" for method in METHODS]
NAMES = ["blue square", "green square", "red square"]  # of the classes of write_tree()
COLOURS = {"red_square": (220, 30, 30), "green_square": (30, 200, 30), "blue_square": (40, 40, 220)}
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def save_tensors(path, tensors, about=None):
    """A .safetensors file, with the JSON that runs keep in it."""
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    save_file(tensors, path, {"about": json.dumps(about)})


def save_clip(path, config, seed=0):
    """A CLIP with random weights as an open_clip local directory."""
    torch.manual_seed(seed)
    path.mkdir(parents=True)
    save_tensors(path / "open_clip_model.safetensors", open_clip.CLIP(**config).state_dict())
    common.write_json(path / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    return f"local-dir:{path}"


TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
VIT = dict(image_size=32, patch_size=8, width=64, head_width=32, layers=2)
RESNET = dict(image_size=32, layers=[1, 1, 1, 1], width=8, patch_size=None)
CONFIG = dict(embed_dim=32, vision_cfg=VIT, text_cfg=TEXT)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("vit") / "m", CONFIG)


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("rn") / "m", {**CONFIG, "vision_cfg": RESNET})


def write_tree(root, train=20, test=10, size=40, seed=0):
    """A folder data set of JPEGs: three classes told apart by colour, one shift, all darker; with
    descriptions."""
    rng = np.random.default_rng(seed)
    for split, n, light in (("train", train, 1.0), ("test", test, 1.0), ("shifts/dark", test, 0.4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = light * (np.array(colour) + rng.normal(0, 25, (size, size, 3)))
                pixels = np.clip(pixels, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")
    told = {name: f"a plate of {name.split()[0]}" for name in NAMES}
    (root / "descriptions.json").write_text(json.dumps(told))
    return root


def data_flags(tree, model):
    return ["--data", "folder", "--data-dir", tree, "--model", model]


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


@pytest.fixture
def base(tree, tiny_vit):
    """Flags of a run on `tree`."""
    return data_flags(tree, tiny_vit)


@pytest.fixture
def small(tmp_path, tiny_vit):
    """Flags of a run on a smaller tree, tmp_path/tree."""
    return data_flags(write_tree(tmp_path / "tree", train=8, test=2), tiny_vit)


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script, *flags, cwd="."):
    """Run a method to its end in a process of its own; returns its results.json."""
    done = subprocess.run(command(script, *flags), cwd=cwd, capture_output=True, text=True,
                          timeout=600, env=ENV)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return results_of(Path(cwd, folder_of(flags)))


def folder_of(flags):
    """The folder of a run with these flags."""
    return flags[flags.index("--out" if "--out" in flags else "--resume") + 1]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def rows_of(results):
    """{row: {test: metrics}} of a results.json"""
    return {row["name"]: row["tests"] for row in results["rows"]}


def log_of(folder, key="step"):
    """The lines of log.jsonl that have `key`."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def args_of(script, *flags):
    """The flags of a method as its get_args() makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        return importlib.import_module(script.removesuffix(".py")).get_args()


def in_process(script, flags, stdout, stderr):
    """Run a method's cli() in this process, which saves the seconds that imports take; without
    workers, unless flags have some."""
    method = importlib.import_module(script.removesuffix(".py"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", [script, "--workers", "0", *map(str, flags)])
        common.cli(method.main)


class Screen(io.StringIO):
    """A stdout in memory."""

    def reconfigure(self, **_):
        pass


def printed(script, *flags):
    """What a method prints on stdout, run to its end in this process."""
    out, err = Screen(), io.StringIO()
    try:
        in_process(script, flags, out, err)
    except SystemExit as end:  # --help
        assert not end.code, err.getvalue()
    return out.getvalue()


def here(script, *flags):
    """results.json of a method run to its end in this process."""
    printed(script, *flags)
    return results_of(folder_of(flags))


def complaint(script, *flags):
    """The line on stderr that a method ends with on a mistake, with exit code 2."""
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as end:
        in_process(script, flags, sys.stdout, stderr)
    last = stderr.getvalue().strip().splitlines()[-1]
    assert end.value.code == 2 and last.startswith("error: "), stderr.getvalue()
    assert "Traceback" not in stderr.getvalue()
    return last
