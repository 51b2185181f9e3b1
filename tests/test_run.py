"""A run as users meet it: several ranks, kills at random moments, broken images, foreign and
hostile checkpoints, --predict. Nothing is lost, nothing that is loaded runs code."""
import csv
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import load_file

import common
import lipsum_ft
from tests.conftest import (
    ROOT,
    Screen,
    command,
    complaint,
    in_process,
    printed,
    save_tensors,
    write_tree,
)

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
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


def torchrun(n, script, *flags, cwd):
    ranks = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
             "--master_port", str(random.randint(20_000, 60_000))]
    done = subprocess.run([*ranks, str(ROOT / script), *map(str, flags)], cwd=cwd,
                          capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr[-3000:]
    return results_of(cwd / flags[flags.index("--out") + 1])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    return np.array([line["loss"] for line in log_of(folder) if "loss" in line])


def same_weights(a, b):
    for name in ("open_clip_model.safetensors", "head.safetensors"):
        want, got = (load_file(folder / name) for folder in (a, b))
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want), name


def here(script, *flags):
    """{row: {test: metrics}} of a method run to its end in this process."""
    printed(script, *flags)
    return {row["name"]: row["tests"]
            for row in results_of(flags[flags.index("--out") + 1])["rows"]}


# ------------------------------------ Ranks ------------------------------------


@pytest.mark.parametrize("script, more", [("lipsum_ft.py", ["--augment", "crop-flip"]),
                                          ("drm.py", ["--lam", 1])])
def test_two_ranks_are_one_process_with_the_same_command_line(tmp_path, tiny_vit, script, more):
    tree = write_tree(tmp_path / "tree", train=30)
    told = {f"{c} square": f"all {c}" for c in ("red", "green", "blue")}
    (tree / "descriptions.json").write_text(json.dumps(told))
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 20,
             "--batch-size", 12, "--accum", 2, "--lr", 1e-4, "--workers", 0, "--no-baseline", *more,
             "--grad-clip", 10]  # clips some steps: AdamW alone does not notice a wrong scale
    printed(script, *flags, "--out", tmp_path / "one")
    one = results_of(tmp_path / "one")
    two = torchrun(2, script, *flags, "--out", tmp_path / "two", cwd=tmp_path)
    a, b = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(a) == 20 and np.abs(a - b).max() <= 1e-5 and abs(a[0] - a[-1]) > 1e-3
    for x, y in zip(one["rows"], two["rows"], strict=True):
        assert x["name"] == y["name"]
        for test, wanted in x["tests"].items():
            got = y["tests"][test]
            assert wanted["acc"] == got["acc"] and wanted["n"] == got["n"]
            assert wanted["nll"] == pytest.approx(got["nll"], abs=1e-4)


def test_evaluation_on_two_ranks_equals_one_to_the_last_digit(tmp_path, tiny_vit):
    flags = ["--limit", 600, "--tests", "neon,noisy"]  # three batches each, the last smaller
    printed("lipsum_ft.py", "--model", tiny_vit, "--steps", 1, "--lr", 0, "--lam", 0, *flags,
            "--out", tmp_path / "one")
    one = results_of(tmp_path / "one")
    two = torchrun(2, "lipsum_ft.py", "--finetuned", "one", *flags, "--out", "two", cwd=tmp_path)
    wanted = [row["tests"] for row in one["rows"]]
    assert wanted == [row["tests"] for row in two["rows"]]
    assert [test["n"] for test in wanted[0].values()] == [600, 600, 600]  # no duplicates


def test_batchnorm_on_two_ranks_is_evaluated_as_it_is_saved(tmp_path, tiny_resnet):
    tree = write_tree(tmp_path / "tree")
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_resnet, "--steps", 6,
             "--batch-size", 16, "--lr", 1e-3, "--workers", 0]
    trained = torchrun(2, "lipsum_ft.py", *flags, "--out", "r", cwd=tmp_path)
    printed("lipsum_ft.py", "--finetuned", tmp_path / "r", "--workers", 0, "--out",
            tmp_path / "again")
    saved = results_of(tmp_path / "again")
    assert saved["rows"][1]["name"] == "fine-tuned"
    assert saved["rows"][1]["tests"] == trained["rows"][1]["tests"]
    assert saved["rows"][1]["tests"] != saved["rows"][0]["tests"]


# ------------------------------------ Stops and resumes ------------------------------------


def test_five_kills_at_random_moments_leave_the_same_weights(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", test=2)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 300,
             "--batch-size", 8, "--save-every", 0, "--workers", 0, "--augment", "crop",
             "--no-baseline", "--keep", "best"]
    printed("lipsum_ft.py", *flags, "--out", tmp_path / "whole")
    begun = command("lipsum_ft.py", *flags, "--out", tmp_path / "killed")
    rng, kills = random.Random(0), 0
    while kills < 5:
        process = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=ENV)
        log = tmp_path / "killed" / "log.jsonl"
        while process.poll() is None:  # until it trains
            if log.exists() and log.stat().st_mtime > time.time() - 1:
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        begun = command("lipsum_ft.py", "--resume", tmp_path / "killed")
        if process.returncode == 0:
            break
    assert kills >= 3, "the run was too short to be killed"
    printed("lipsum_ft.py", "--resume", tmp_path / "killed")
    same_weights(tmp_path / "whole", tmp_path / "killed")
    whole, killed = (log_of(tmp_path / run) for run in ("whole", "killed"))
    assert whole == killed and len(losses_of(tmp_path / "whole")) == 300


def heard():
    """A job in a shell's background starts with Ctrl-C ignored, which a run respects."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_signal_saves_and_tells_how_to_go_on(tmp_path, tiny_vit, number):
    """Ctrl-C reaches the workers too."""
    tree = write_tree(tmp_path / "tree", train=8, test=2)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--batch-size", 4,
             "--steps", 100, "--no-baseline"]
    begun = command("lipsum_ft.py", *flags, "--workers", 1, "--out", tmp_path / "r")
    process = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENV, start_new_session=True, preexec_fn=heard)
    log = tmp_path / "r" / "log.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"--resume {tmp_path / 'r'}" in last, stderr
    assert "Traceback" not in stderr and process.returncode == 2
    saved = torch.load(tmp_path / "r" / "last.ckpt", weights_only=True)["next"][0]
    assert 0 < saved == len(losses_of(tmp_path / "r")) < 100
    printed("lipsum_ft.py", "--resume", tmp_path / "r", "--workers", 0)
    printed("lipsum_ft.py", *flags, "--workers", 0, "--out", tmp_path / "whole")
    same_weights(tmp_path / "whole", tmp_path / "r")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "r")


def test_nohup_is_respected(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=8, test=2)
    begun = command("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit,
                    "--steps", 100, "--batch-size", 4, "--workers", 0, "--out", tmp_path / "r")
    process = subprocess.Popen(["nohup", *begun], stdout=subprocess.DEVNULL, env=ENV,
                               stderr=subprocess.DEVNULL)
    while not (tmp_path / "r" / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0 and len(losses_of(tmp_path / "r")) == 100


def test_ranks_stop_together_and_go_on(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=8, test=2)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--batch-size", 4,
             "--steps", 400, "--no-baseline", "--workers", 0]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    begun = [*ranks, *command("lipsum_ft.py", *flags, "--out", tmp_path / "r")[1:]]
    process = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENV)
    log = tmp_path / "r" / "log.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    _, stderr = process.communicate(timeout=60)
    assert f"error: stopped; --resume {tmp_path / 'r'} goes on" in stderr
    saved = torch.load(tmp_path / "r" / "last.ckpt", weights_only=True)["next"][0]
    assert 0 < saved == len(losses_of(tmp_path / "r")) < 400
    printed("lipsum_ft.py", "--resume", tmp_path / "r")
    assert len(losses_of(tmp_path / "r")) == 400


def test_a_run_that_diverges_is_told_to_lower_the_rate(tmp_path, tiny_vit):
    """Also at the end of an epoch, where its weights give no numbers any more."""
    tree = write_tree(tmp_path / "tree")
    for steps in (1, 2, 9):
        flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--lr", 1e9,
                 "--steps", steps, "--batch-size", 27, "--warmup", 0, "--workers", 0]
        out, adamw = tmp_path / str(steps), torch.optim.AdamW
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "AdamW",
                          lambda p, lr, **how: adamw(p, lr=lr * 1e28, **how))
            assert "--lr" in complaint("lipsum_ft.py", *flags, "--no-baseline", "--out", out)
        assert np.isfinite(losses_of(out)).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_training_image_is_one_line_and_the_run_goes_on(tmp_path, tiny_vit, workers):
    tree = write_tree(tmp_path / "tree", test=3)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--epochs", 1,
             "--batch-size", 4, "--workers", workers, "--augment", "crop", "--no-baseline"]
    printed("lipsum_ft.py", *flags, "--out", tmp_path / "whole")
    about = SimpleNamespace(**json.loads((tmp_path / "whole" / "args.json").read_text()))
    train = common.load_data(about).train
    parts = common.shuffled_epochs(len(train), about, 5, 6)  # images of step 5
    file = tmp_path / os.fsdecode(train.images[next(parts)[2][1]])
    good = file.read_bytes()
    file.write_bytes(good[:len(good) // 2])
    out = tmp_path / "r"
    message = complaint("lipsum_ft.py", *flags, "--out", out)
    assert str(file) in message and "cannot be read as an image" in message
    assert f"put a readable one of that name in its place; --resume {out}" in message
    assert len(log_of(out)) == 5 and not (out / "results.json").exists()  # all steps before it
    assert torch.load(out / "last.ckpt", weights_only=True)["next"][0] == 5
    assert str(file) in complaint("lipsum_ft.py", "--resume", out)  # still broken
    file.write_bytes(good)
    printed("lipsum_ft.py", "--resume", out)
    same_weights(tmp_path / "whole", out)
    assert log_of(out) == log_of(tmp_path / "whole")


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_broken_held_out_image_saves_what_was_trained_before(tmp_path, tiny_vit, keep):
    tree = write_tree(tmp_path / "tree", test=3)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--epochs", 3, "--keep",
             keep, "--batch-size", 7, "--workers", 0, "--no-baseline", "--lr", 1e-3]
    printed("lipsum_ft.py", *flags, "--out", tmp_path / "whole")
    about = SimpleNamespace(**json.loads((tmp_path / "whole" / "args.json").read_text()))
    file, out = tmp_path / os.fsdecode(common.load_data(about).val.images[0]), tmp_path / "r"
    good = file.read_bytes()
    file.write_text("<html>404</html>")
    message = complaint("lipsum_ft.py", *flags, "--out", out)
    assert str(file) in message and f"--resume {out}" in message
    assert len(log_of(out)) == 8  # 54 images, 7 a step: the first epoch ends in step 8
    file.write_bytes(good)
    printed("lipsum_ft.py", "--resume", out)
    same_weights(tmp_path / "whole", out)
    assert log_of(out) == log_of(tmp_path / "whole")


def test_a_broken_test_image_is_met_before_the_first_step_and_leaves_nothing(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=8, test=2)
    file = tree / "shifts" / "dark" / "red_square" / "001.jpg"
    file.write_text("<html>404</html>")
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 2,
             "--batch-size", 4, "--workers", 1, "--out", tmp_path / "r"]
    for script in ("lipsum_ft.py", "vrf.py", "wise_ft.py"):
        message = complaint(script, *flags)
        assert str(file) in message and "cannot be read as an image" in message
        assert not (tmp_path / "r").exists()


def test_the_zero_shot_row_comes_before_the_first_step_and_once(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=8, test=5)
    text = printed("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit,
                   "--steps", 2, "--batch-size", 4, "--workers", 0, "--out", tmp_path / "r")
    lines = text.splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("zero-shot ")]
    steps = [i for i, line in enumerate(lines) if line.startswith("step 2: ")]
    assert len(rows) == 2 and rows[0] < steps[0] < rows[1] and lines[rows[0]].split()[1:] == [
        cell for cell in lines[rows[1]].split()[1:]]
    assert lines[-1].startswith("Lipsum-FT ")  # the table is the last thing
    again = printed("lipsum_ft.py", "--resume", tmp_path / "r").splitlines()
    assert sum(line.startswith("zero-shot ") for line in again) == 1


def test_held_out_accuracy_is_that_of_the_saved_model(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=40, test=2)
    printed("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--epochs",
            3, "--lr", 7e-5, "--batch-size", 16, "--holdout", 0.5, "--workers", 0, "--no-baseline",
            "--out", tmp_path / "r")
    logged = {line["step"]: line["held_out_acc"] for line in log_of(tmp_path / "r")
              if "held_out_acc" in line}
    assert list(logged) == [4, 8, 12]  # 60 images: 3.75 steps an epoch, then the next has begun
    assert len(set(logged.values())) > 1
    about = SimpleNamespace(**json.loads((tmp_path / "r" / "args.json").read_text()))
    files = [os.fsdecode(path) for path in common.load_data(about).val.images]
    assert len(files) == 60
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'r'}")
    x = torch.stack([preprocess(Image.open(file)) for file in files])
    head = load_file(tmp_path / "r" / "head.safetensors")["head"]
    with torch.no_grad():
        predicted = (clip.eval().encode_image(x, normalize=True) @ head.T).argmax(1)
    names = ["blue_square", "green_square", "red_square"]
    right = [file.split("/")[-2] == names[c] for file, c in zip(files, predicted)]
    assert logged[12] == pytest.approx(100 * sum(right) / 60)


def test_a_closed_pipe_does_not_end_a_run(tmp_path, tiny_vit):
    """As `| head -1`"""
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    begun = command("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit,
                    "--steps", 2, "--batch-size", 4, "--workers", 0, "--out", tmp_path / "r")
    process = subprocess.Popen(begun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=ENV)
    assert "images" in process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "BrokenPipe" not in stderr, stderr
    assert len(results_of(tmp_path / "r")["rows"]) == 2


SPAWN = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.test_run import read_until_broken

if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    torch.save(read_until_broken({flags!r}), {out!r})
"""


def read_until_broken(flags):
    """[(images, labels, index)] of the batches before the first broken image, and its message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lipsum_ft.py", *flags])
        args = lipsum_ft.get_args()
    images = common.load_data(args).train
    images.prepare(PreprocessCfg(size=32))
    batches = common.batches_of(images.augmented(args.augment, 0), args, 0, 9)
    seen = []
    try:
        for batch in batches:
            seen.append(batch[:3])
    except common.Fail as error:
        return seen, str(error)


def test_workers_can_be_spawned(tmp_path):
    """As on macOS and Windows, where workers import the files anew and get pickled images."""
    tree = write_tree(tmp_path / "tree", train=12, test=1)
    file = tree / "train" / "red_square" / "007.jpg"
    file.write_text("no image")
    flags = ["--data", "folder", "--data-dir", str(tree), "--batch-size", "4", "--holdout", "0",
             "--augment", "crop-flip", "--workers"]
    script, out = tmp_path / "spawn.py", tmp_path / "seen.pt"
    script.write_text(SPAWN.format(root=str(ROOT), flags=[*flags, "1"], out=str(out)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr
    want, reason = read_until_broken([*flags, "0"])
    got, spawned_reason = torch.load(out)
    assert reason == spawned_reason and reason.startswith(f"{file}: cannot be read as an image")
    assert len(want) == len(got) >= 2
    for a, b in zip(want, got):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------ Hostile files ------------------------------------


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {Evil.path}",))


def test_crafted_checkpoints_are_refused_and_run_nothing(tmp_path, tiny_vit):
    Evil.path = tmp_path / "owned"
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    data = ["--data", "folder", "--data-dir", tree, "--workers", 0]
    printed("lipsum_ft.py", *data, "--model", tiny_vit, "--steps", 2, "--no-baseline", "--out",
            tmp_path / "r")
    checkpoint, new = tmp_path / "r" / "last.ckpt", ["--out", tmp_path / "new"]
    whole = torch.load(checkpoint, weights_only=True)
    checkpoint.write_bytes(pickle.dumps(Evil()))
    assert "last.ckpt" in complaint("lipsum_ft.py", "--resume", tmp_path / "r")
    torch.save({**whole, "next": Evil()}, checkpoint)
    assert "last.ckpt" in complaint("lipsum_ft.py", "--resume", tmp_path / "r")
    torch.save({"state_dict": Evil()}, tmp_path / "weights.pt")
    assert "weights.pt" in complaint("lipsum_ft.py", *data, "--model", "ViT-S-32-alt",
                                     "--pretrained", tmp_path / "weights.pt", *new)
    message = complaint("wise_ft.py", *data, "--model", tiny_vit, "--finetuned",
                        tmp_path / "weights.pt", *new)
    assert "weights.pt" in message and "model.state_dict()" in message
    (tmp_path / "r" / "head.safetensors").write_bytes(pickle.dumps(Evil()))
    assert str(tmp_path / "r") in complaint("wise_ft.py", "--finetuned", tmp_path / "r", *new)
    assert not Evil.path.exists()
    torch.save(Evil(), tmp_path / "loaded.pt")
    torch.load(tmp_path / "loaded.pt", weights_only=False)
    assert Evil.path.exists()  # it would have run


# ------------------------------------ --predict ------------------------------------


def small_tree(root):
    write_tree(root, train=12, test=5)
    (root / "descriptions.json").write_text(json.dumps({name: f"a {name[:-7]}" for name in NAMES}))
    return root


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
    """(lines of stdout below the header, as lists of columns, stderr) of --predict."""
    out, err = Screen(), io.StringIO()
    in_process(script, ["--finetuned", run, "--predict", folder, "--workers", 0], out, err)
    header, *lines = csv.reader(io.StringIO(out.getvalue()), "excel-tab")
    assert header == ["path", "class", "probability", "d", "omega"][:len(header)]
    assert all(len(line) == len(header) for line in lines)
    return lines, err.getvalue()


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
    assert f"left out: {runs.new / 'broken.jpg'}: cannot be read" in stderr
    assert "1 files are no images" in stderr  # note.txt
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = ["--finetuned", tmp_path / "moved", "--predict", empty]
    assert str(empty) in complaint(f"{method}.py", *flags)
    missing = complaint(f"{method}.py", *flags[:3], empty / "none")
    assert "none: No such file or directory" in missing


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
    bank = load_file(run / "vrf.safetensors")
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
    got = [line.split("\t") for line in done.stdout.splitlines()][1:]
    assert done.returncode == 0 and [line[:2] for line in got] == [line[:2] for line in want]
    assert "broken.jpg: cannot be read" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["wise_ft.py", "lipsum_ft.py"])
def test_a_run_of_two_heads_is_not_predicted_by_one(runs, script):
    """The df head alone answered dog where the mixture says cat."""
    line = complaint(script, "--finetuned", runs.tmp / "drm", "--predict", runs.new)
    assert "has two heads" in line and str(runs.tmp / "drm") in line


def test_files_of_any_name_are_predicted_one_by_one_or_in_folders(runs, tmp_path):
    good = runs.files[0].read_bytes()
    names = ["a\ttab.jpg", "a\nline.jpg", os.fsdecode(b"caf\xe9.jpg"), "quote\".jpg", "x.JFIF"]
    for name in names:
        (tmp_path / name).write_bytes(good)
    for hidden in (".thumbnails/a.jpg", "@eaDir/a.jpg", "__MACOSX/._a.jpg", "._x.jpg"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(good)
    lines, _ = predicted("lipsum_ft.py", runs.tmp / "lipsum_ft", tmp_path)
    assert sorted(line[0] for line in lines) == sorted(str(tmp_path / name) for name in names)
    assert len({tuple(line[1:]) for line in lines}) == 1
    [one], _ = predicted("lipsum_ft.py", runs.tmp / "lipsum_ft", tmp_path / "a\ttab.jpg")
    assert one == lines[[line[0] for line in lines].index(str(tmp_path / "a\ttab.jpg"))]
    done = subprocess.run(command("lipsum_ft.py", "--finetuned", runs.tmp / "lipsum_ft",
                                  "--predict", tmp_path), capture_output=True, env=ENV)
    assert b"caf\xe9.jpg" in done.stdout and done.returncode == 0


def test_weights_that_are_no_numbers_are_refused(runs, tmp_path):
    for method in ("wise_ft", "lipsum_ft", "drm"):
        run = shutil.copytree(runs.tmp / method, tmp_path / method)
        file = "head.safetensors" if method == "wise_ft" else "open_clip_model.safetensors"
        with open(run / file, "rb") as f:
            about = {"classnames": NAMES}
            weights = load_file(run / file)
            f.close()
        name = "head" if method == "wise_ft" else "visual.proj"
        save_tensors(run / file, {**weights, name: weights[name] * torch.nan}, about)
        line = complaint(f"{method}.py", "--finetuned", run, "--predict", runs.new, "--workers", 0)
        assert str(run) in line and ("not finite" in line or "not numbers" in line)


@pytest.mark.parametrize("method, figures", [
    ("wise_ft", ["plane.png"]), ("lipsum_ft", ["plane.png"]), ("drm", ["plane.png"]),
    ("vrf", ["plane.png", "ratio.png"])])
def test_figures_are_drawn(runs, method, figures):
    for name in figures:
        with Image.open(runs.tmp / method / name) as figure:
            assert len(figure.convert("RGB").getcolors(2**20)) > 20, name  # not an empty page


# ------------------------------------ --finetuned ------------------------------------


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
        save_tensors(tmp / path, state)
    torch.save(state, tmp / "clip.pt")
    wrapped = {f"module.{k}": v for k, v in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp / "wrapped.pt")
    torch.save({**kept, **own}, tmp / "wise.pt")
    torch.save({"model_state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
               tmp / "compiled.pt")
    torch.save({"model": {f"model.{k}": v for k, v in state.items()}}, tmp / "lightning.pt")
    openai = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    torch.save({**state, **openai}, tmp / "openai.pt")
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
    *((path, "unit") for path in ("folder", "clip.safetensors", "clip.pt", "wrapped.pt",
                                  "compiled.pt", "lightning.pt", "openai.pt")),
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
    table = text.split("saved to ")[1].splitlines()[2:]
    assert [line.split()[0] for line in table] == ["zero-shot", "fine-tuned", "OSE", "WSE", "VRF"]
    assert all(re.search(r"( +\d+\.\d\d){7}$", line) for line in table), table
    rows = json.loads((tmp_path / "v" / "results.json").read_text())["rows"]
    for row in rows[:2]:
        for test, want in foreign.want["unit"][row["name"]].items():
            assert row["tests"][test]["nll"] == pytest.approx(want, abs=1e-4), (row["name"], test)
    assert (tmp_path / "v" / "fine-tuned" / "head.safetensors").is_file()


def test_what_is_no_checkpoint_is_refused_in_one_line(foreign, tmp_path):
    (tmp_path / "torn.pt").write_bytes((foreign.tmp / "clip.pt").read_bytes()[:1000])
    torch.save([1, 2], tmp_path / "list.pt")
    for path in (foreign.tmp / "pickle.pt", tmp_path / "torn.pt", tmp_path / "list.pt",
                 foreign.tree, tmp_path / "nowhere"):
        flags = [*foreign.base, "--finetuned", path, "--out", tmp_path / "new"]
        for script in ("wise_ft.py", "vrf.py", "lipsum_ft.py", "drm.py"):
            line = complaint(script, *flags)
            assert str(path) in line and len(line) < 300 + len(str(path)), line
    assert not (tmp_path / "new").exists()


def test_a_converted_pickle_is_taken(foreign, tmp_path):
    """What the message on a pickled model asks for."""
    model = torch.load(foreign.tmp / "pickle.pt", weights_only=False)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    rows = here("wise_ft.py", *foreign.base, "--finetuned", tmp_path / "state.pt", "--alphas", 1,
                "--out", tmp_path / "w")
    for test, want in foreign.want["unit"]["fine-tuned"].items():
        assert rows["fine-tuned"][test]["nll"] == pytest.approx(want, abs=1e-4)
