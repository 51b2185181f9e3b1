"""Several ranks, kills at random moments, hostile files: a run is the same, nothing is lost."""
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, command, complaint, printed, write_tree
from open_clip.transform import PreprocessCfg
from PIL import Image

import common
import lipsum_ft

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(n, script, *flags, cwd):
    ranks = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
             "--master_port", str(random.randint(20_000, 60_000))]
    done = subprocess.run([*ranks, str(ROOT / script), *map(str, flags)], cwd=cwd,
                          capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return results_of(cwd / flags[flags.index("--out") + 1])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    for name in ("open_clip_model.safetensors", "head.safetensors"):
        want, got = (common.load_tensors(folder / name)[0] for folder in (a, b))
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want), name


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
    a, b = ([line["loss"] for line in log_of(tmp_path / run)] for run in ("one", "two"))
    assert len(a) == 20 and np.abs(np.array(a) - b).max() <= 1e-5 and abs(a[0] - a[-1]) > 1e-3
    for x, y in zip(one["rows"], two["rows"], strict=True):
        assert x["name"] == y["name"]
        for test, wanted in x["tests"].items():
            got = y["tests"][test]
            assert wanted["acc"] == got["acc"] and wanted["n"] == got["n"]
            assert wanted["nll"] == pytest.approx(got["nll"], abs=1e-4)


def test_evaluation_on_two_ranks_equals_one_to_the_last_digit(tmp_path, tiny_vit):
    flags = ["--limit", 600, "--tests", "test,neon,noisy"]  # three batches each, the last smaller
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
    assert saved["rows"][1]["name"] == "Lipsum-FT"
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
    for line in (*whole, *killed):
        del line["images_per_s"]
    assert whole == killed and len(whole) == 300


def test_stop_signal_saves_and_tells_how_to_go_on(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    begun = command("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit,
                    "--steps", 100_000, "--batch-size", 4, "--workers", 0, "--no-baseline", "--out",
                    tmp_path / "r")
    process = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "r" / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    last = stderr.strip().splitlines()[-1]
    assert "stopped after step" in last and f"--resume {tmp_path / 'r'}" in last
    assert "Traceback" not in stderr and process.returncode == 2
    saved = torch.load(tmp_path / "r" / "last.ckpt", weights_only=True)
    assert saved["step"] > 0 and f"stopped after step {saved['step']} " in last
    assert len(log_of(tmp_path / "r")) == saved["step"]


def test_resume_needs_the_layout_of_the_parameters_and_the_same_stream(tmp_path):
    """Fused AdamW reads moments by the memory layout of the parameter (channels_last)."""
    def parts():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)

    def step(model, optimizer, seed):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole, again = parts(), parts()
    for seed in range(2):
        step(*whole[:2], seed)
    common.Checkpoint(tmp_path, *whole, [9, 4, 20]).save(2, {})
    assert common.Checkpoint(tmp_path, *again, [9, 4, 20]).load() == (2, {})
    for model, optimizer, _ in (whole, again):
        step(model, optimizer, 2)
    assert torch.equal(whole[0].weight, again[0].weight)
    for other in ([8, 4, 20], [9, 8, 20], [9, 4, 21]):  # steps, images a step, training images
        with pytest.raises(common.Fail, match="resume with the same images"):
            common.Checkpoint(tmp_path, *again, other).load()


def test_non_finite_loss_stops_and_names_its_files(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree")
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--lr", 1e30, "--steps",
             9, "--batch-size", 4, "--warmup", 0, "--workers", 0]
    message = complaint("lipsum_ft.py", *flags, "--out", tmp_path / "r")
    files = list((tmp_path / "r").glob("nonfinite-step*.txt"))
    assert len(files) == 1 and str(files[0]) in message
    lines = log_of(tmp_path / "r")
    bad = lines[-1]["step"]  # the first, although the device is read for many steps at once
    assert f"step {bad}: the loss is {lines[-1]['loss']}" in message
    assert all(np.isfinite(line["loss"]) for line in lines[:-1]) and bad < 8
    about = json.loads((tmp_path / "r" / "args.json").read_text())
    train = common.load_data(SimpleNamespace(**about)).train
    sampler = common.ShuffledEpochs(len(train), SimpleNamespace(**about), bad, bad + 1)
    wanted = [train.describe(i) for _, i in next(iter(sampler))]
    assert files[0].read_text().split() == wanted and len(wanted) == 4
    assert not (tmp_path / "r" / "last.ckpt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_training_image_is_one_line_and_the_run_goes_on(tmp_path, tiny_vit, workers):
    tree = write_tree(tmp_path / "tree", test=3)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--epochs", 1,
             "--batch-size", 4, "--workers", workers, "--augment", "crop", "--no-baseline"]
    printed("lipsum_ft.py", *flags, "--out", tmp_path / "whole")
    about = SimpleNamespace(**json.loads((tmp_path / "whole" / "args.json").read_text()))
    train = common.load_data(about).train
    parts = common.ShuffledEpochs(len(train), about, 5, 6)  # images of step 5
    bad = next(iter(parts))[2][1]
    file = tmp_path / train.describe(bad)
    good = file.read_bytes()
    file.write_bytes(good[:len(good) // 2])
    out = tmp_path / "r"
    message = complaint("lipsum_ft.py", *flags, "--out", out)
    assert str(file) in message and "cannot be read as an image" in message
    assert message.endswith(f"--resume {out}") and "Traceback" not in message
    assert len(log_of(out)) == 5 and not (out / "results.json").exists()  # all steps before it
    assert torch.load(out / "last.ckpt", weights_only=True)["step"] == 5
    assert str(file) in complaint("lipsum_ft.py", "--resume", out)  # still broken
    file.write_bytes(good)
    printed("lipsum_ft.py", "--resume", out)
    same_weights(tmp_path / "whole", out)
    assert [line["step"] for line in log_of(out)] == list(range(14))


def test_a_broken_test_image_is_met_before_the_first_step(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    file = tree / "shifts" / "dark" / "red_square" / "001.jpg"
    good = file.read_bytes()
    file.write_text("<html>404</html>")
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 2,
             "--batch-size", 4, "--no-baseline", "--workers", 1, "--out", tmp_path / "r"]
    message = complaint("lipsum_ft.py", *flags)
    assert str(file) in message and "cannot be read as an image" in message
    assert not (tmp_path / "r" / "log.jsonl").exists()
    file.write_bytes(good)
    printed("lipsum_ft.py", "--resume", tmp_path / "r")
    assert results_of(tmp_path / "r")["rows"][1]["tests"]["dark"]["n"] == 6


def test_zero_shot_row_comes_before_the_first_step_and_once(tmp_path, tiny_vit, monkeypatch):
    tree = write_tree(tmp_path / "tree", train=4, test=5)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 2,
             "--batch-size", 4, "--workers", 0, "--no-baseline", "--out", tmp_path / "r"]

    def stopped(*_):
        raise common.Fail("stopped by the test")
    with monkeypatch.context() as patch, monkeypatch.context() as screen:
        patch.setattr(common, "train", stopped)
        screen.setattr(sys, "stdout", io.StringIO())
        assert "stopped by the test" in complaint("lipsum_ft.py", *flags)
        shown = sys.stdout.getvalue()
    rows = [line for line in shown.splitlines() if line.startswith("zero-shot")]
    assert not any(line.startswith("zero-shot: ")
                   for line in printed("lipsum_ft.py", "--resume", tmp_path / "r").splitlines())
    first = results_of(tmp_path / "r")["rows"][0]
    cells = ", ".join(f"{test} {found['acc']:.2f}" for test, found in first["tests"].items())
    assert first["name"] == "zero-shot" and rows == [f"zero-shot: {cells}"]
    assert list(first["tests"]) == ["test", "dark"]


def test_held_out_accuracy_of_every_epoch_is_logged(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=40, test=2)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--epochs", 3, "--lr",
             7e-5, "--batch-size", 16, "--holdout", 0.5, "--workers", 0, "--no-baseline"]
    printed("lipsum_ft.py", *flags, "--out", tmp_path / "r")
    logged = {line["epoch"]: line["held_out_acc"] for line in log_of(tmp_path / "r")
              if "held_out_acc" in line}
    assert list(logged) == [1, 2, 3] and len(set(logged.values())) > 1
    steps = [line["step"] for line in log_of(tmp_path / "r") if "held_out_acc" in line]
    assert steps == [3, 7, 11]  # 60 images: 3.75 steps an epoch, at which the next one has begun

    about = SimpleNamespace(**json.loads((tmp_path / "r" / "args.json").read_text()))
    held_out = common.load_data(about).val
    assert len(held_out) == 60
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'r'}")
    files = [held_out.describe(i) for i in range(60)]
    x = torch.stack([preprocess(Image.open(file)) for file in files])
    head = common.load_tensors(tmp_path / "r" / "head.safetensors")[0]["head"]
    with torch.no_grad():
        predicted = (clip.eval().encode_image(x, normalize=True) @ head.T).argmax(1)
    names = ["blue_square", "green_square", "red_square"]
    right = [file.split("/")[-2] == names[c] for file, c in zip(files, predicted)]
    assert logged[3] == pytest.approx(100 * sum(right) / 60)


def test_a_closed_pipe_does_not_end_a_run(tmp_path, tiny_vit):
    """As `| head -1`"""
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    begun = command("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit,
                    "--steps", 2, "--batch-size", 4, "--workers", 0, "--out", tmp_path / "r")
    process = subprocess.Popen(begun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=ENV)
    assert "lipsum_ft on folder" in process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "BrokenPipe" not in stderr, stderr
    assert len(results_of(tmp_path / "r")["rows"]) == 2


SPAWN = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from test_scale import read_until_broken

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
    batches = common.batches_of(images.augmented(args.augment, 0), args, 0, 9, torch.device("cpu"))
    seen = []
    try:
        for batch in batches:
            seen.append(batch[:3])
    except common.BrokenImage as error:
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
    torch.save({**whole, "best": Evil()}, checkpoint)
    assert "last.ckpt" in complaint("lipsum_ft.py", "--resume", tmp_path / "r")
    torch.save({"state_dict": Evil()}, tmp_path / "weights.pt")
    assert "weights.pt" in complaint("lipsum_ft.py", *data, "--model", "ViT-S-32-alt",
                                     "--pretrained", tmp_path / "weights.pt", *new)
    message = complaint("wise_ft.py", *data, "--model", tiny_vit, "--finetuned",
                        tmp_path / "weights.pt", *new)
    assert "weights.pt" in message and "state dict" in message
    (tmp_path / "r" / "head.safetensors").write_bytes(pickle.dumps(Evil()))
    assert "head.safetensors" in complaint("wise_ft.py", "--finetuned", tmp_path / "r", *new)
    assert not Evil.path.exists()
    torch.save(Evil(), tmp_path / "loaded.pt")
    torch.load(tmp_path / "loaded.pt", weights_only=False)
    assert Evil.path.exists()  # it would have run


@pytest.mark.parametrize("dump, load", [
    (torch.save, "torch.load('MODEL.pt', weights_only=False)"),
    (pickle.dump, "pickle.load(open('MODEL.pt', 'rb'))")])  # wise-ft's ImageClassifier.save()
def test_a_pickled_model_of_another_tool_is_told_how_to_be_converted(
        tmp_path, tiny_vit, monkeypatch, dump, load):
    monkeypatch.chdir(tmp_path)
    with open("MODEL.pt", "wb") as file:
        dump(open_clip.create_model(tiny_vit), file)
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--workers", 0]
    message = complaint("wise_ft.py", *flags, "--finetuned", "MODEL.pt", "--out", "new")
    save = "torch.save(model.state_dict(), 'STATE.pt')"
    assert f"--finetuned {tmp_path / 'MODEL.pt'}" in message
    assert save in message and load in message
    assert not (tmp_path / "new").exists()
    exec(f"model = {load}; {save}", {"torch": torch, "pickle": pickle})  # the advice, followed
    printed("wise_ft.py", *flags, "--finetuned", "STATE.pt", "--alphas", 1, "--out", "new")
    zero_shot, *_, tuned = results_of(tmp_path / "new")["rows"]
    assert tuned["tests"]["test"]["nll"] == pytest.approx(zero_shot["tests"]["test"]["nll"])


def test_table_of_mistakes(tmp_path, tiny_vit, tiny_resnet, monkeypatch):
    """What is wrong with flags, trees and runs: one line, exit code 2, nothing lost or left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit]
    printed("lipsum_ft.py", *base, "--steps", 1, "--workers", 0, "--out", "done")
    (tmp_path / "done" / "notes.txt").write_text("precious")
    told = {"green square": "x", "blue square": "y"}
    files = {"list": [], "short": {"red square": "x"}, "number": {"red square": 1, **told},
             "other": {"cat": "a", **told}, "long": {"red square": "so " * 99, **told}}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "broken.json").write_text("{'a': 1")
    copies = {}
    for change in ("no_test", "no_train", "empty_class", "extra_class", "flat", "templates",
                   "classnames", "shift_test", "shift_held"):
        copies[change] = write_tree(tmp_path / change, train=2, test=1)
    (copies["no_test"] / "test").rename(copies["no_test"] / "tests")
    (copies["no_train"] / "train").rename(copies["no_train"] / "training")
    for f in (copies["empty_class"] / "train" / "red_square").iterdir():
        f.unlink()
    (copies["extra_class"] / "shifts" / "dark" / "pink_square").mkdir()
    for f in list((copies["flat"] / "test").rglob("*.jpg")):
        f.rename(copies["flat"] / f"{f.parent.name}-{f.name}")
    shifts = copies["shift_test"] / "shifts"
    (shifts / "dark").rename(shifts / "test")
    shifts = copies["shift_held"] / "shifts"
    (shifts / "dark").rename(shifts / "held-out")
    (copies["templates"] / "templates.txt").write_text("a photo\n")
    (copies["classnames"] / "classnames.txt").write_text("nothing\there\n")

    def at(change):
        return ["--data", "folder", "--data-dir", copies[change], "--model", tiny_vit]
    halves = {"part": '{"method": "lipsum_ft", "part_of": "done"}',
              "half": '{"method": "lipsum_ft", "data": "shapes"}',
              "few": '{"method": "wise_ft", "data": "shapes", "shots": 4, "seed": 0}',
              "torn": '{"method": "lips'}
    for name, text in halves.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(text)
    (tmp_path / "few" / "head.safetensors").touch()

    def lipsum(*rows):
        return [("lipsum_ft.py", flags, words) for *flags, words in rows]
    table = [
        *lipsum(("--data", "imagnet", "imagnet"),
                (*base, "--steps", 1, "--epochs", 1, "exclude")),
        ("wise_ft.py", ["--data", "domainnets"], "domainnets"),
        ("vrf.py", ["--data", ""], "--data"), ("drm.py", ["--data", "x"], "shapes"),
        *lipsum(*((*base, flag, value, flag) for flag, value in (
            ("--lr", -1), ("--lr", "nan"), ("--lr", "fast"), ("--wd", -0.1), ("--epochs", 0),
            ("--steps", 0), ("--steps", 1.5), ("--batch-size", 0), ("--accum", 0), ("--warmup", -1),
            ("--grad-clip", -1), ("--holdout", 1), ("--shots", -1), ("--workers", -2),
            ("--seed", -1), ("--lam", -1), ("--texts", 0), ("--text-length", 0), ("--alpha", 2),
            ("--augment", "mixup"), ("--freeze", "all"), ("--precision", "int8"), ("--limit", -5),
            ("--tests", "nope"), ("--shots", 10), ("--lra", 1), ("--save-every", -1),
            ("--keep", "all")))),
        *lipsum((*base, "--text-length", 99, "--text-length"),
                (*base, "--device", "tpu9", "--device"),
                (*base, "--steps", 8, "--warmup", 500, "--warmup 0 is"),
                (*base, "--steps", 30, "--warmup", 30, "--warmup 3 is"),
                (*base, "--batch-size", 10, "--accum", 4, "x 4 --accum parts; 8 is"),
                (*base, "--batch-size", 3, "--accum", 4, "; 4 is"),
                (*base, "--predict", tree, "--finetuned RUN")),
        *lipsum(*((*base, flag, 1, f"{flag}: no such flag; {ours}") for flag, ours in (
            ("--data-location", "here it is --data-dir"), ("--k", "here it is --shots"),
            ("--warmup_length", "here it is --warmup"), ("--lambda", "here it is --lam"),
            ("--train-dataset", "here it is --data"), ("--eval-datasets", "here it is --tests"),
            ("--accum-freq", "here it is --accum"), ("--batchsize", "did you mean --batch-size")))),
        ("wise_ft.py", [*base, "--k=4"], "here it is --shots"),
        ("lipsum_ft.py", at("shift_test"), "cannot have that name"),
        ("lipsum_ft.py", at("shift_held"), "cannot have that name"),
        ("drm.py", [*base, "--prompt", "a {} or {}"], "--prompt"),
        *(("wise_ft.py", ["--finetuned", "done", flag, value], f"{what} must be the same")
          for flag, value, what in (("--holdout", 0.5, "held-out images"),
                                    ("--pretrain-seed", 1, "the zero-shot model"),
                                    ("--model", "ViT-B-16", "the zero-shot model"))),
        ("wise_ft.py", ["--finetuned", "few", "--seed", 5], "the --shots images must be the same"),
        ("lipsum_ft.py", ["--resume", "part"], "resume that"),
        ("wise_ft.py", [*base, "--alphas", 2], "--alphas"),
        ("wise_ft.py", [*base, "--select", "--holdout", 0], "--holdout"),
        ("vrf.py", [*base, "--a", 0], "--a"), ("vrf.py", [*base, "--b", 0], "--b"),
        ("vrf.py", [*base, "--k", -1], "--k"),
        ("vrf.py", [*base, "--holdout", 0, "--out", "v0"], "--holdout"),
        *((script, [*base, "--predict", tree], "--finetuned RUN")
          for script in ("wise_ft.py", "vrf.py", "drm.py")),
        ("drm.py", base, "--keep best: no held-out images"),
        ("drm.py", [*base, "--keep", "last"], "--descriptions"),
        ("drm.py", [*base, "--prompt", "x"], "--prompt"),
        *(("drm.py", [*base, "--keep", "last", "--descriptions", file], words) for file, words in (
            ("list.json", "list.json"), ("broken.json", "not valid JSON"),
            ("short.json", "1 descriptions"), ("number.json", "red square"),
            ("other.json", "red square"), ("long.json", "77"), ("missing.json", "not found"))),
        *(("lipsum_ft.py", at(change), words) for change, words in (
            ("no_test", "test"), ("no_train", "train"), ("empty_class", "red_square"),
            ("extra_class", "pink_square"), ("flat", "blue_square"),
            ("templates", "templates.txt"), ("classnames", "classnames.txt"))),
        *(("lipsum_ft.py", [*base[:4], *flags], words) for *flags, words in (
            ("--model", "ViT-B-99", "ViT-B-99"), ("--model", "ViT-B-16", "QuickGELU"),
            ("--model", "ViT-B-16", "--pretrained", "nope", "nope"),
            ("--model", "ViT-B-16-quickgelu", "could not be loaded"),
            ("--model", "ViT-B/16", "--model ViT-B-16-quickgelu --pretrained openai"),
            ("--model", "hf-hub:nobody/nothing", "could not be loaded"),
            ("--model", "local-dir:gone", "gone"))),
        ("lipsum_ft.py", [*base, "--out", "done"], "not empty"),
        ("lipsum_ft.py", [*base, "--out", "list.json"], "list.json"),
        ("lipsum_ft.py", ["--resume", "gone"], "gone"),
        ("lipsum_ft.py", ["--resume", "torn"], "not valid JSON"),
        ("wise_ft.py", ["--resume", "done"], "lipsum_ft.py"),
        ("lipsum_ft.py", ["--resume", "done", "--lam", 2], "--lam"),
        ("wise_ft.py", ["--finetuned", "half"], "not finished"),
        ("wise_ft.py", ["--finetuned", "gone"], "gone"),
        ("wise_ft.py", ["--finetuned", "done", "--model", tiny_resnet, "--out", "w"],
         "not a run or model of"),
        ("wise_ft.py", ["--finetuned", "done", "--data", "shapes", "--out", "w2"],
         "--data shapes"),
        ("drm.py", ["--finetuned", "done", "--descriptions", "d.json"], "d.json"),
    ]
    assert len(table) >= 100
    before = sorted(p.name for p in tmp_path.iterdir())
    for script, flags, words in table:
        message = complaint(script, *flags)
        assert words in message, (script, flags, message)
    assert (tmp_path / "done" / "notes.txt").read_text() == "precious"
    left = set(p.name for p in tmp_path.iterdir()) - set(before)
    assert not left, left
