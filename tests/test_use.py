"""What a user does with a run: --predict, and --finetuned from every kind of checkpoint."""
import io
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import command, complaint, in_process, printed, write_tree
from PIL import Image

import common

NAMES = ["blue square", "green square", "red square"]
SIX_LINES = """
import open_clip, torch, json; from safetensors import safe_open; from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:RUN")
with safe_open("RUN/head.safetensors", "pt") as f: head = {k: f.get_tensor(k) for k in f.keys()}; \
names = json.loads(f.metadata()["about"])["classnames"]
x = model.eval().encode_image(preprocess(Image.open(FILE).convert("RGB"))[None], normalize=True)
p = (head["scale"] * x @ head["head"].T + head.get("bias", 0)).softmax(-1)
"""
TRAIN = ["--steps", 4, "--lr", 1e-3, "--batch-size", 12, "--keep", "last", "--workers", 0]


def here(script, *flags):
    """{row: {test: metrics}} of a method run to its end in this process."""
    printed(script, *flags)
    out = flags[flags.index("--out") + 1]
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {row["name"]: row["tests"] for row in rows}


def small_tree(root):
    write_tree(root, train=12, test=5)
    (root / "descriptions.json").write_text(json.dumps({name: f"a {name[:-7]}" for name in NAMES}))
    return root


# ---- --predict ----

@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_vit):
    """A run of each method, whose data are gone, and a folder of new images with a broken one."""
    tmp = tmp_path_factory.mktemp("runs")
    tree = small_tree(tmp / "tree")
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, *TRAIN]
    for method in ("wise_ft", "lipsum_ft", "vrf", "drm"):
        here(f"{method}.py", *base, "--out", tmp / method)
    shutil.rmtree(tree)
    new = tmp / "new"
    write_tree(new, train=1, test=1, size=50, seed=1)
    Image.open(new / "test" / "red_square" / "000.jpg").convert("L").save(new / "grey.png")
    (new / "broken.jpg").write_text("no image")
    (new / "note.txt").write_text("no image either")
    files = sorted(p for p in new.rglob("*.*") if p.name not in ("broken.jpg", "note.txt"))
    assert len(files) == 10
    return SimpleNamespace(tmp=tmp, new=new, files=files)


def predicted(script, run, folder):
    """(lines of stdout in columns, stderr) of --predict."""
    out, err = io.StringIO(), io.StringIO()
    in_process(script, ["--finetuned", run, "--predict", folder, "--workers", 0], out, err)
    return [line.split("\t") for line in out.getvalue().splitlines()], err.getvalue()


@pytest.mark.parametrize("method, columns", [("wise_ft", 3), ("lipsum_ft", 3), ("vrf", 5),
                                             ("drm", 3)])
def test_predictions_need_the_run_folder_alone(runs, tmp_path, method, columns):
    shutil.copytree(runs.tmp / method, tmp_path / "moved")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "moved").rglob("*")}
    lines, stderr = predicted(f"{method}.py", tmp_path / "moved", runs.new)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "moved").rglob("*")} == before
    assert [len(line) for line in lines] == [columns] * 10
    assert sorted(line[0] for line in lines) == [str(file) for file in runs.files]
    assert all(line[1] in NAMES and 1 / 3 <= float(line[2]) <= 1 for line in lines)
    assert stderr.count("\n") == 1 and f"{runs.new / 'broken.jpg'}: cannot be read" in stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = ["--finetuned", tmp_path / "moved", "--predict", empty]
    assert str(empty) in complaint(f"{method}.py", *flags)


def six_lines(run, file):
    """The variables that the README's six lines leave."""
    found = {}
    with torch.no_grad():
        exec(SIX_LINES.replace("FILE", repr(str(file))).replace("RUN", str(run)), found)
    return found


@pytest.mark.parametrize("method", ["wise_ft", "lipsum_ft"])
def test_predictions_equal_the_six_lines_of_the_readme(runs, method):
    run, seen = runs.tmp / method, set()
    lines, _ = predicted(f"{method}.py", run, runs.new)
    for path, name, probability in lines:
        found = six_lines(run, path)
        p = found["p"][0]
        assert found["names"] == NAMES and p.shape == (3,)
        assert p[NAMES.index(name)] >= p.max() - 1e-4
        assert float(probability) == pytest.approx(p.max().item(), abs=1e-4)
        seen.add(probability)
    assert len(seen) > 5


def test_predictions_of_vrf_are_its_ensemble_by_hand(runs):
    run = runs.tmp / "vrf"
    state = json.loads((run / "vrf.json").read_text())
    bank, _ = common.load_tensors(run / "vrf.safetensors")
    assert state["failures"] == len(bank["bank"]) > 0
    for path, name, probability, d, omega in predicted("vrf.py", run, runs.new)[0]:
        zero_shot, tuned = (six_lines(run / part, path) for part in ("zero-shot", "fine-tuned"))
        distances = (bank["bank"] - tuned["x"]).double().square().sum(dim=1)
        want_d = distances.sort().values[state["k"] - 1].item()
        w = 1 / (1 + np.exp((want_d - state["a"]) / state["b"]))
        p_zs = (zero_shot["p"][0].log() / state["t_zs"]).softmax(0)
        p_ft = (tuned["p"][0].log() / state["t_ft"]).softmax(0)
        p = w * p_ft + (1 - w) * p_zs
        assert float(d) == pytest.approx(want_d, abs=1e-4)
        assert float(omega) == pytest.approx(w, abs=2e-3)
        assert float(probability) == pytest.approx(p.max().item(), abs=2e-3)
        assert p[NAMES.index(name)] >= p.max() - 2e-3


def test_stdout_of_the_command_is_nothing_but_the_lines(runs):
    flags = ["--finetuned", runs.tmp / "drm", "--predict", runs.new]  # with worker processes
    done = subprocess.run(command("drm.py", *flags), capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    want, _ = predicted("drm.py", runs.tmp / "drm", runs.new)
    got = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [line[:2] for line in got] == [line[:2] for line in want]
    assert "broken.jpg: cannot be read" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("method, figures", [
    ("wise_ft", ["curve.png"]), ("lipsum_ft", ["plane.png"]), ("drm", ["plane.png"]),
    ("vrf", ["plane.png", "ratio.png"])])
def test_figures_are_drawn(runs, method, figures):
    for name in figures:
        with Image.open(runs.tmp / method / name) as figure:
            assert len(figure.convert("RGB").getcolors(2**20)) > 20, name  # not an empty page


# ---- --finetuned ----

@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tiny_vit):
    """A tree, a CLIP tuned elsewhere, its state dict in many forms, and what its rows must be."""
    tmp = tmp_path_factory.mktemp("foreign")
    tree = small_tree(tmp / "tree")
    torch.manual_seed(5)
    start, _, preprocess = open_clip.create_model_and_transforms(tiny_vit)
    tuned = open_clip.create_model(tiny_vit).eval()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn_like(p) if p.ndim else 0.2)
    state = tuned.state_dict()

    prefix = "image_encoder.model."  # what wise-ft keeps of the CLIP: all but the text transformer
    kept = {prefix + k: v for k, v in state.items() if not k.startswith("transformer.")}
    own = {"classification_head.weight": torch.randn(3, 32) * 8,
           "classification_head.bias": torch.randn(3)}
    (tmp / "folder").mkdir()
    shutil.copy(os.path.join(tiny_vit[10:], "open_clip_config.json"), tmp / "folder")
    for path in ("folder/open_clip_model.safetensors", "clip.safetensors"):
        common.save_tensors(tmp / path, state)
    torch.save(state, tmp / "clip.pt")
    wrapped = {f"module.{k}": v for k, v in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp / "wrapped.pt")
    torch.save({**kept, **own}, tmp / "wise.pt")
    torch.save(tuned, tmp / "pickle.pt")

    start.eval()
    between = open_clip.create_model(tiny_vit).eval()
    between.load_state_dict({k: (v + state[k]) / 2 for k, v in start.state_dict().items()})
    heads = [open_clip.build_zero_shot_classifier(
        clip, open_clip.get_tokenizer(tiny_vit), NAMES, ["a photo of a {}."]).T
        for clip in (start, tuned)]
    scales = [clip.logit_scale.exp().item() for clip in (start, tuned)]
    assert abs(scales[1] / scales[0] - 1) > 0.1
    unit = [(heads[0], scales[0], 0), ((heads[0] + heads[1]) / 2, sum(scales) / 2, 0),
            (heads[1], scales[1], 0)]
    ends = (scales[0] * heads[0], 0), tuple(own.values())
    folded = [(ends[0][0], 1, 0), ((ends[0][0] + ends[1][0]) / 2, 1, ends[1][1] / 2),
              (ends[1][0], 1, ends[1][1])]

    files = {"test": sorted((tree / "test").rglob("*.jpg")),
             "dark": sorted((tree / "shifts" / "dark").rglob("*.jpg"))}
    want = {"unit": {}, "folded": {}}
    for test, paths in files.items():
        x = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])
        y = torch.tensor([NAMES.index(path.parent.name.replace("_", " ")) for path in paths])
        with torch.no_grad():
            for kind, all_heads in (("unit", unit), ("folded", folded)):
                rows = zip(("zero-shot", "WiSE-FT 0.5", "fine-tuned"), (start, between, tuned),
                           all_heads)
                for row, clip, (head, scale, bias) in rows:
                    z = scale * clip.encode_image(x, normalize=True) @ head.T + bias
                    nll = F.cross_entropy(z.double(), y).item()
                    want[kind].setdefault(row, {})[test] = nll
    for kind, rows in want.items():
        values = [nll for tests in rows.values() for nll in tests.values()]
        assert len({round(value, 3) for value in values}) == 6, kind
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--workers", 0]
    return SimpleNamespace(tmp=tmp, tree=tree, base=base, want=want)


@pytest.mark.parametrize("path, kind", [
    ("folder", "unit"), ("clip.safetensors", "unit"), ("clip.pt", "unit"), ("wrapped.pt", "unit"),
    ("wise.pt", "folded")])
def test_a_model_tuned_elsewhere_has_its_own_rows(foreign, tmp_path, path, kind):
    rows = here("wise_ft.py", *foreign.base, "--finetuned", foreign.tmp / path, "--alphas", 0.5,
                "--out", tmp_path / "w")
    got = {row: {test: found["nll"] for test, found in tests.items()}
           for row, tests in rows.items()}
    assert list(got) == list(foreign.want[kind])
    for row in got:
        assert got[row] == pytest.approx(foreign.want[kind][row], abs=1e-4), row


def test_a_finished_run_has_its_rows_again_to_the_last_digit(foreign, tmp_path):
    flags = [*foreign.base, *TRAIN, "--alphas", 0.5, "--alpha", 1]
    want = here("wise_ft.py", *flags, "--out", tmp_path / "run")
    for part in ("", "fine-tuned"):
        got = here("wise_ft.py", "--finetuned", tmp_path / "run" / part, "--alphas", 0.5,
                   "--workers", 0, "--out", tmp_path / f"again-{part}")
        assert got == want and list(got) == ["zero-shot", "WiSE-FT 0.5", "fine-tuned"]


def test_vrf_runs_on_a_state_dict_to_its_table(foreign, tmp_path):
    flags = [*foreign.base, "--finetuned", foreign.tmp / "clip.pt", "--out", tmp_path / "v"]
    text = printed("vrf.py", *flags)
    table = text.split("saved to ")[1].splitlines()
    names = ["zero-shot", "fine-tuned", "OSE", "WSE", "VRF"]
    assert [line.split()[0] for line in table[3:]] == names
    assert all(re.search(r"( +\d+\.\d\d){7}$", line) for line in table[3:]), table
    rows = json.loads((tmp_path / "v" / "results.json").read_text())["rows"]
    for row in rows[:2]:
        for test, want in foreign.want["unit"][row["name"]].items():
            assert row["tests"][test]["nll"] == pytest.approx(want, abs=1e-4), (row["name"], test)
    assert (tmp_path / "v" / "fine-tuned" / "head.safetensors").is_file()


def test_what_is_no_checkpoint_is_refused_in_one_line(foreign, tmp_path):
    (tmp_path / "torn.pt").write_bytes((foreign.tmp / "clip.pt").read_bytes()[:1000])
    for path, words in ((foreign.tmp / "pickle.pt", "torch.save(model.state_dict()"),
                        (tmp_path / "torn.pt", "not a state dict"),
                        (foreign.tree, "not a state dict or open_clip folder"),
                        (tmp_path / "nowhere", "not found")):
        flags = [*foreign.base, "--finetuned", path, "--out", tmp_path / "new"]
        for script in ("wise_ft.py", "vrf.py", "lipsum_ft.py", "drm.py"):
            line = complaint(script, *flags)
            assert words in line and str(path) in line, line
    assert not (tmp_path / "new").exists()


# ---- Transparent images ----

def test_transparent_images_are_counted_and_read_as_open_clip_reads_them(tmp_path, tiny_vit):
    tree, rng = write_tree(tmp_path / "tree", train=4, test=2), np.random.default_rng(0)
    files = [tree / split / "red_square" / f"{size}.png"
             for split in ("train", "test", "shifts/dark") for size in (32, 50, 90)]
    for file in files:
        pixels = rng.integers(256, size=(int(file.stem), 48, 4), dtype=np.uint8)
        pixels[:20, :, 3] = 0
        Image.fromarray(pixels, "RGBA").save(file)
    Image.fromarray(pixels[..., :3]).save(tree / "train" / "red_square" / "opaque.png")
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--workers", 0]
    text = printed("wise_ft.py", *flags, *TRAIN[:-2], "--out", tmp_path / "run")
    said = [line for line in text.splitlines() if "are transparent" in line]
    assert len(said) == 1 and said[0].startswith("9 images are transparent")

    _, _, preprocess = open_clip.create_model_and_transforms(tiny_vit)
    dataset = common.ImageSet("x", common.file_paths(files), [0] * 9)
    dataset.prepare(open_clip.transform.PreprocessCfg(size=32))
    for i, file in enumerate(files):
        got = dataset.normalized(dataset[i][0][None])[0]
        assert torch.equal(got, preprocess(Image.open(file)))
