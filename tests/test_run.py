"""A run as users meet it: several ranks, kills at random moments, broken images, foreign and
hostile checkpoints, --predict. Nothing is lost, nothing that is loaded runs code."""
import contextlib
import csv
import io
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
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
from tests.conftest import (
    ENV,
    METHODS,
    NAMES,
    RANKS,
    ROOT,
    SCRIPTS,
    Screen,
    args_of,
    command,
    complaint,
    data_flags,
    here,
    in_process,
    log_of,
    printed,
    results_of,
    rows_of,
    save_tensors,
    write_tree,
)

TRAIN = ["--steps", 4, "--lr", 1e-3, "--batch-size", 12, "--keep", "last"]


def torchrun(script, *flags, out):
    begun = [*RANKS, *command(script, *flags, "--out", out)[1:]]
    done = subprocess.run(begun, env=ENV, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr[-3000:]
    return rows_of(results_of(out))


def losses_of(folder):
    return np.array([line["loss"] for line in log_of(folder, "loss")])


def same_runs(a, b):
    """Two folders have the same log, and weights that are equal to the last bit."""
    assert log_of(a) == log_of(b)
    for name in ("open_clip_model.safetensors", "head.safetensors"):
        want, got = (load_file(folder / name) for folder in (a, b))
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want), name


def hear():
    """Under nohup, or in a shell's background, a process starts with signals ignored, which a run
    respects."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_DFL)


def started(*begun, out):
    """The process of a run that has begun to train."""
    process = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENV, start_new_session=True, preexec_fn=hear)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    return process


# ------------------------------------ Ranks ------------------------------------


@pytest.mark.parametrize("script, more", [("lipsum_ft.py", ["--augment", "crop-flip"]),
                                          ("drm.py", ["--lam", 1])])
def test_two_ranks_are_one_process_with_the_same_command_line(tmp_path, tiny_vit, script, more):
    flags = [*data_flags(write_tree(tmp_path / "tree", train=30), tiny_vit), "--steps", 20,
             "--batch-size", 12, "--accum", 2, "--lr", 1e-4, "--workers", 0, "--no-baseline", *more,
             "--grad-clip", 10]  # clips some steps: AdamW alone does not notice a wrong scale
    one = rows_of(here(script, *flags, "--out", tmp_path / "one"))
    two = torchrun(script, *flags, out=tmp_path / "two")
    a, b = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(a) == 20 and np.abs(a - b).max() <= 1e-5 and abs(a[0] - a[-1]) > 1e-3
    assert list(one) == list(two)
    for row, tests in one.items():
        for test, wanted in tests.items():
            got = two[row][test]
            assert wanted["acc"] == got["acc"] and wanted["n"] == got["n"]
            assert wanted["nll"] == pytest.approx(got["nll"], abs=1e-4)


def test_evaluation_on_two_ranks_equals_one_to_the_last_digit(tmp_path, tiny_vit):
    flags = ["--limit", 600, "--tests", "neon,noisy"]  # three batches each, the last smaller
    one = rows_of(here("lipsum_ft.py", "--model", tiny_vit, "--steps", 1, "--lr", 0, "--lam", 0,
                       *flags, "--out", tmp_path / "one"))
    two = torchrun("lipsum_ft.py", "--finetuned", tmp_path / "one", *flags, out=tmp_path / "two")
    assert list(one.values()) == list(two.values())
    assert [test["n"] for test in one["zero-shot"].values()] == [600, 600, 600]  # no duplicates


def test_batchnorm_on_two_ranks_is_evaluated_as_it_is_saved(tmp_path, tiny_resnet):
    tree = write_tree(tmp_path / "tree", test=90)  # two batches: each rank evaluates one
    trained = torchrun("lipsum_ft.py", *data_flags(tree, tiny_resnet), "--steps", 6,
                       "--batch-size", 16, "--lr", 1e-3, "--workers", 0, out=tmp_path / "r")
    saved = rows_of(here("lipsum_ft.py", "--finetuned", tmp_path / "r", "--out", tmp_path / "w"))
    assert saved["fine-tuned"] == trained["Lipsum-FT"] != saved["zero-shot"]


# ------------------------------------ Stops and resumes ------------------------------------


def test_five_kills_at_random_moments_leave_the_same_weights(tmp_path, tiny_vit):
    flags = [*data_flags(write_tree(tmp_path / "tree", test=2), tiny_vit), "--steps", 300,
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
    same_runs(tmp_path / "whole", tmp_path / "killed")
    assert len(losses_of(tmp_path / "whole")) == 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_signal_saves_and_tells_how_to_go_on(tmp_path, small, number):
    """Ctrl-C reaches the workers too."""
    out, flags = tmp_path / "r", [*small, "--batch-size", 4, "--steps", 100, "--no-baseline"]
    process = started(*command("lipsum_ft.py", *flags, "--workers", 1, "--out", out), out=out)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"--resume {out}" in last, stderr
    assert "Traceback" not in stderr and process.returncode == 2
    saved = torch.load(out / "last.ckpt", weights_only=True)["next"][0]
    assert 0 < saved == len(losses_of(out)) < 100
    printed("lipsum_ft.py", "--resume", out)
    printed("lipsum_ft.py", *flags, "--out", tmp_path / "whole")
    same_runs(tmp_path / "whole", out)


def test_nohup_is_respected(tmp_path, small):
    begun = command("lipsum_ft.py", *small, "--steps", 100, "--batch-size", 4, "--workers", 0,
                    "--out", tmp_path / "r")
    process = started("nohup", *begun, out=tmp_path / "r")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0 and len(losses_of(tmp_path / "r")) == 100


def test_ranks_stop_together_and_go_on(tmp_path, small):
    out = tmp_path / "r"
    begun = command("lipsum_ft.py", *small, "--batch-size", 4, "--steps", 400, "--no-baseline",
                    "--workers", 0, "--out", out)
    process = started(*RANKS, *begun[1:], out=out)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    _, stderr = process.communicate(timeout=60)
    assert f"error: stopped; --resume {out} goes on" in stderr
    saved = torch.load(out / "last.ckpt", weights_only=True)["next"][0]
    assert 0 < saved == len(losses_of(out)) < 400
    printed("lipsum_ft.py", "--resume", out)
    assert len(losses_of(out)) == 400


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_run_that_diverges_is_told_to_lower_the_rate(tmp_path, base, monkeypatch, steps):
    """Also at the end of an epoch, where its weights give no numbers any more."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **how: adamw(p, lr=lr * 1e28, **how))
    flags = [*base, "--lr", 1e9, "--steps", steps, "--batch-size", 27, "--warmup", 0]
    assert "--lr" in complaint("lipsum_ft.py", *flags, "--no-baseline", "--out", tmp_path / "r")
    assert np.isfinite(losses_of(tmp_path / "r")).all()


HELD_OUT = ["--batch-size", 7, "--epochs", 3, "--lr", 1e-3]  # 54 images: 8 steps an epoch


@pytest.mark.parametrize("split, step, more", [
    *(("train", 5, ["--batch-size", 4, "--epochs", 1, "--workers", n]) for n in (0, 1)),
    *(("val", 8, [*HELD_OUT, "--keep", keep]) for keep in ("best", "last"))])
def test_a_broken_image_is_one_line_and_the_run_goes_on(tmp_path, tiny_vit, split, step, more):
    """All steps before it are kept."""
    flags = [*data_flags(write_tree(tmp_path / "tree", test=3), tiny_vit), "--augment", "crop",
             "--no-baseline", *more]
    printed("lipsum_ft.py", *flags, "--out", tmp_path / "whole")
    args = SimpleNamespace(**common.read_json(tmp_path / "whole" / "args.json"))
    data, out = common.load_data(args), tmp_path / "r"
    file = Path(os.fsdecode(data.val.images[0]))
    if split == "train":
        parts = common.shuffled_epochs(len(data.train), args, step, step + 1)
        file = Path(os.fsdecode(data.train.images[next(parts)[2][1]]))
    good = file.read_bytes()
    file.write_bytes(good[:len(good) // 2])
    message = complaint("lipsum_ft.py", *flags, "--out", out)
    assert str(file) in message and "cannot be read as an image" in message
    assert f"put a readable one of that name in its place; --resume {out}" in message
    assert len(log_of(out)) == step and not (out / "results.json").exists()
    assert torch.load(out / "last.ckpt", weights_only=True)["next"][0] == step
    assert str(file) in complaint("lipsum_ft.py", "--resume", out)  # still broken
    file.write_bytes(good)
    printed("lipsum_ft.py", "--resume", out)
    same_runs(tmp_path / "whole", out)


def test_a_broken_test_image_is_met_before_the_first_step_and_leaves_nothing(tmp_path, small):
    file = tmp_path / "tree" / "shifts" / "dark" / "red_square" / "001.jpg"
    file.write_text("<html>404</html>")
    for script in ("lipsum_ft.py", "vrf.py", "wise_ft.py"):
        message = complaint(script, *small, "--steps", 2, "--batch-size", 4, "--workers", 1,
                            "--out", tmp_path / "r")
        assert str(file) in message and "cannot be read as an image" in message
        assert not (tmp_path / "r").exists()


def test_the_zero_shot_row_comes_before_the_first_step_and_once(tmp_path, small):
    lines = printed("lipsum_ft.py", *small, "--steps", 2, "--batch-size", 4, "--out",
                    tmp_path / "r").splitlines()
    first, second = [i for i, line in enumerate(lines) if line.startswith("zero-shot ")]
    [step] = [i for i, line in enumerate(lines) if line.startswith("step 2: ")]
    assert first < step < second and lines[first].split() == lines[second].split()
    assert lines[-1].startswith("Lipsum-FT ")  # the table is the last thing
    again = printed("lipsum_ft.py", "--resume", tmp_path / "r").splitlines()
    assert sum(line.startswith("zero-shot ") for line in again) == 1


def test_held_out_accuracy_is_that_of_the_saved_model(tmp_path, tiny_vit):
    tree, out = write_tree(tmp_path / "tree", train=40, test=2), tmp_path / "r"
    flags = [*data_flags(tree, tiny_vit), "--epochs", 3, "--lr", 7e-5, "--batch-size", 16,
             "--holdout", 0.5, "--no-baseline", "--out", out]
    printed("lipsum_ft.py", *flags)
    logged = {line["step"]: line["held_out_acc"] for line in log_of(out, "held_out_acc")}
    assert list(logged) == [4, 8, 12]  # 60 images: 3.75 steps an epoch, then the next has begun
    assert len(set(logged.values())) > 1
    val = common.load_data(args_of("lipsum_ft.py", *flags[:-2])).val
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    x = torch.stack([preprocess(Image.open(os.fsdecode(file))) for file in val.images])
    head = load_file(out / "head.safetensors")["head"]
    with torch.no_grad():
        predicted = (clip.eval().encode_image(x, normalize=True) @ head.T).argmax(1)
    right = (predicted == val.labels).sum().item()
    assert logged[12] == pytest.approx(100 * right / 60) and len(val) == 60


def test_a_closed_pipe_does_not_end_a_run(tmp_path, small):
    """As `| head -1`"""
    begun = command("lipsum_ft.py", *small, "--steps", 2, "--batch-size", 4, "--workers", 0,
                    "--out", tmp_path / "r")
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
    args = args_of("lipsum_ft.py", *flags)
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


def test_crafted_checkpoints_are_refused_and_run_nothing(tmp_path, small):
    Evil.path = tmp_path / "owned"
    printed("lipsum_ft.py", *small, "--steps", 2, "--no-baseline", "--out", tmp_path / "r")
    checkpoint, new = tmp_path / "r" / "last.ckpt", [*small, "--out", tmp_path / "new"]
    whole = torch.load(checkpoint, weights_only=True)
    checkpoint.write_bytes(pickle.dumps(Evil()))
    assert "last.ckpt" in complaint("lipsum_ft.py", "--resume", tmp_path / "r")
    torch.save({**whole, "next": Evil()}, checkpoint)
    assert "last.ckpt" in complaint("lipsum_ft.py", "--resume", tmp_path / "r")
    torch.save({"state_dict": Evil()}, tmp_path / "weights.pt")
    assert "weights.pt" in complaint("lipsum_ft.py", *new, "--model", "ViT-S-32-alt",
                                     "--pretrained", tmp_path / "weights.pt")
    message = complaint("wise_ft.py", *new, "--finetuned", tmp_path / "weights.pt")
    assert "weights.pt" in message and "model.state_dict()" in message
    (tmp_path / "r" / "head.safetensors").write_bytes(pickle.dumps(Evil()))
    assert str(tmp_path / "r") in complaint("wise_ft.py", "--finetuned", tmp_path / "r", *new[-2:])
    assert not Evil.path.exists()
    torch.save(Evil(), tmp_path / "loaded.pt")
    torch.load(tmp_path / "loaded.pt", weights_only=False)
    assert Evil.path.exists()  # it would have run


# ------------------------------------ --predict ------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_vit):
    """A run of each method, whose data are gone, and a folder of new images with a broken one."""
    tmp = tmp_path_factory.mktemp("runs")
    tree = write_tree(tmp / "tree", train=12, test=5)
    for method in METHODS:
        printed(f"{method}.py", *data_flags(tree, tiny_vit), *TRAIN, "--out", tmp / method)
    shutil.rmtree(tree)
    new = tmp / "new"
    write_tree(new, train=1, test=1, size=50, seed=1)
    Image.open(new / "test" / "red_square" / "000.jpg").convert("L").save(new / "grey.png")
    (new / "broken.jpg").write_text("no image")
    files = sorted(p for p in new.rglob("*.*") if p.name not in ("broken.jpg", "descriptions.json"))
    assert len(files) == 10
    return SimpleNamespace(tmp=tmp, new=new, files=files)


def predicted(script, run, folder):
    """(lines of stdout below the header, as lists of columns, stderr) of --predict."""
    out, err = Screen(), io.StringIO()
    in_process(script, ["--finetuned", run, "--predict", folder], out, err)
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
    assert "1 files are no images" in stderr  # descriptions.json
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = ["--finetuned", tmp_path / "moved", "--predict", empty]
    assert str(empty) in complaint(f"{method}.py", *flags)
    missing = complaint(f"{method}.py", *flags[:3], empty / "none")
    assert "none: No such file or directory" in missing


def six_lines(run, file):
    """The variables that the README's six lines leave, and what they print."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Your own images\n")[1]
    code, found, out = re.search(r"```python\n(.*?)```", section, re.S)[1], {}, io.StringIO()
    with torch.no_grad(), contextlib.redirect_stdout(out):
        exec(code.replace("IMAGE", str(file)).replace("RUN", str(run)), found)
    return found | {"printed": out.getvalue().split()}


@pytest.mark.parametrize("method", ["wise_ft", "lipsum_ft"])
def test_predictions_equal_the_six_lines_of_the_readme(runs, method):
    run, seen = runs.tmp / method, set()
    lines, _ = predicted(f"{method}.py", run, runs.new)
    for path, name, probability in lines:
        found = six_lines(run, path)
        p = found["p"][0]
        assert found["names"] == NAMES and p.shape == (3,)
        assert p[NAMES.index(name)] >= p.max() - 1e-4
        *words, shown = found["printed"]
        assert words == NAMES[p.argmax()].split() and float(shown) == p.max()
        assert float(probability) == pytest.approx(float(shown), abs=1e-4)
        seen.add(probability)
    assert len(seen) > 5


def test_predictions_of_vrf_are_its_ensemble_by_hand(runs):
    run = runs.tmp / "vrf"
    state, bank = common.read_json(run / "vrf.json"), load_file(run / "vrf.safetensors")
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
    (tmp_path / "broken.jpg").write_text("no image")
    lines, _ = predicted("lipsum_ft.py", runs.tmp / "lipsum_ft", tmp_path)
    assert sorted(line[0] for line in lines) == sorted(str(tmp_path / name) for name in names)
    assert len({tuple(line[1:]) for line in lines}) == 1
    [one], _ = predicted("lipsum_ft.py", runs.tmp / "lipsum_ft", tmp_path / "a\ttab.jpg")
    assert one == lines[[line[0] for line in lines].index(str(tmp_path / "a\ttab.jpg"))]
    # stdout of the command, with worker processes, is nothing but the lines
    done = subprocess.run(command("lipsum_ft.py", "--finetuned", runs.tmp / "lipsum_ft",
                                  "--predict", tmp_path), capture_output=True,
                          env={**ENV, "PYTHONIOENCODING": "utf-8:strict"})
    _, *got = csv.reader(io.StringIO(os.fsdecode(done.stdout)), "excel-tab")
    assert done.returncode == 0 and [line[:2] for line in got] == [line[:2] for line in lines]
    assert b"broken.jpg: cannot be read" in done.stderr and b"Traceback" not in done.stderr


def test_weights_that_are_no_numbers_are_refused(runs, tmp_path):
    for method, file, name in (("wise_ft", "head", "head"),
                               ("lipsum_ft", "open_clip_model", "visual.proj"),
                               ("drm", "open_clip_model", "visual.proj")):
        run = shutil.copytree(runs.tmp / method, tmp_path / method)
        file = run / f"{file}.safetensors"
        weights = load_file(file)
        weights[name] *= torch.nan
        save_tensors(file, weights, {"classnames": NAMES})
        line = complaint(f"{method}.py", "--finetuned", run, "--predict", runs.new)
        assert str(run) in line and ("not finite" in line or "not numbers" in line)


@pytest.mark.parametrize("name", [*(f"{method}/plane.png" for method in METHODS), "vrf/ratio.png"])
def test_figures_are_drawn(runs, name):
    with Image.open(runs.tmp / name) as figure:
        assert len(figure.convert("RGB").getcolors(2**20)) > 20  # not an empty page


# ------------------------------------ --finetuned ------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tiny_vit):
    """A tree, a CLIP tuned elsewhere, its state dict in many forms, and what its rows must be."""
    tmp = tmp_path_factory.mktemp("foreign")
    tree = write_tree(tmp / "tree", train=12, test=5)
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
    shutil.copytree(tiny_vit[10:], tmp / "folder")
    for path in ("folder/open_clip_model.safetensors", "clip.safetensors"):
        save_tensors(tmp / path, state)

    def prefixed(prefix):
        return {prefix + k: v for k, v in state.items()}
    openai = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    for name, saved in {
            "clip": state, "wise": {**kept, **own}, "openai": {**state, **openai}, "pickle": tuned,
            "wrapped": {"epoch": 3, "state_dict": prefixed("module.")},
            "compiled": {"model_state_dict": prefixed("_orig_mod.module.")},
            "lightning": {"model": prefixed("model.")}}.items():
        torch.save(saved, tmp / f"{name}.pt")

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
    return SimpleNamespace(tmp=tmp, tree=tree, base=data_flags(tree, tiny_vit), want=want)


@pytest.mark.parametrize("path, kind", [
    *((path, "unit") for path in ("folder", "clip.safetensors", "clip.pt", "wrapped.pt",
                                  "compiled.pt", "lightning.pt", "openai.pt")),
    ("wise.pt", "folded")])
def test_a_model_tuned_elsewhere_has_its_own_rows(foreign, tmp_path, path, kind):
    rows = rows_of(here("wise_ft.py", *foreign.base, "--finetuned", foreign.tmp / path, "--alphas",
                        0.5, "--out", tmp_path / "w"))
    assert list(rows) == list(foreign.want[kind])
    for row, tests in rows.items():
        got = {test: found["nll"] for test, found in tests.items()}
        assert got == pytest.approx(foreign.want[kind][row], abs=1e-4), row


def test_a_finished_run_has_its_rows_again_to_the_last_digit(foreign, tmp_path):
    run, alphas = tmp_path / "run", ["--alphas", 0.5]
    want = here("wise_ft.py", *foreign.base, *TRAIN, *alphas, "--alpha", 1, "--out", run)["rows"]
    assert [row["name"] for row in want] == ["zero-shot", "WiSE-FT 0.5", "fine-tuned"]
    for part in ("", "fine-tuned"):
        out = tmp_path / f"again-{part}"
        assert here("wise_ft.py", "--finetuned", run / part, *alphas, "--out", out)["rows"] == want


def test_vrf_runs_on_a_state_dict_to_its_table(foreign, tmp_path):
    out = tmp_path / "v"
    text = printed("vrf.py", *foreign.base, "--finetuned", foreign.tmp / "clip.pt", "--out", out)
    table = text.split("saved to ")[1].splitlines()[2:]
    rows = rows_of(results_of(out))
    assert [line.split()[0] for line in table] == ["zero-shot", "fine-tuned", "OSE", "WSE", "VRF"]
    assert all(re.search(r"( +\d+\.\d\d){7}$", line) for line in table), table
    for row in ("zero-shot", "fine-tuned"):
        for test, want in foreign.want["unit"][row].items():
            assert rows[row][test]["nll"] == pytest.approx(want, abs=1e-4), (row, test)
    assert (out / "fine-tuned" / "head.safetensors").is_file()


def test_what_is_no_checkpoint_is_refused_in_one_line(foreign, tmp_path):
    (tmp_path / "torn.pt").write_bytes((foreign.tmp / "clip.pt").read_bytes()[:1000])
    torch.save([1, 2], tmp_path / "list.pt")
    for path in (foreign.tmp / "pickle.pt", tmp_path / "torn.pt", tmp_path / "list.pt",
                 foreign.tree, tmp_path / "nowhere"):
        flags = [*foreign.base, "--finetuned", path, "--out", tmp_path / "new"]
        for script in SCRIPTS:
            line = complaint(script, *flags)
            assert str(path) in line and len(line) < 300 + len(str(path)), line
    assert not (tmp_path / "new").exists()
