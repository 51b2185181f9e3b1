"""Several ranks, kills at random moments, hostile files: a run is the same run, and nothing trained is lost."""
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common
from conftest import ROOT, command, complaint, run, write_tree


def torchrun(n, script, *flags, cwd):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port",
                           str(random.randint(20_000, 60_000)), str(ROOT / script), *map(str, flags)],
                          cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((cwd / flags[flags.index("--out") + 1] / "results.json").read_text())


def losses(path):
    return [json.loads(line)["loss"] for line in (path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script, more", [("lipsum_ft.py", ["--augment", "crop-flip"]), ("drm.py", ["--lam", 1])])
def test_two_ranks_are_one_process_with_twice_the_batch(tmp_path, tiny_vit, script, more):
    tree = write_tree(tmp_path / "tree", train=30)
    (tree / "descriptions.json").write_text(json.dumps({f"{c} square": f"all {c}" for c in ("red", "green", "blue")}))
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 20, "--lr", 1e-4, "--workers", 0, *more,
             "--grad-clip", 10]  # clips some steps: AdamW alone would not notice a gradient of the wrong scale
    one = run(script, *flags, "--batch-size", 12, "--out", "one", cwd=tmp_path)
    two = torchrun(2, script, *flags, "--batch-size", 3, "--accum", 2, "--out", "two", cwd=tmp_path)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(a) == 20 and np.abs(np.array(a) - b).max() <= 1e-5 and abs(a[0] - a[-1]) > 1e-3
    for x, y in zip(one["rows"], two["rows"]):
        assert x["name"] == y["name"]
        for test in x["tests"]:
            assert x["tests"][test]["acc"] == y["tests"][test]["acc"] and x["tests"][test]["n"] == y["tests"][test]["n"]
            assert x["tests"][test]["nll"] == pytest.approx(y["tests"][test]["nll"], abs=1e-4)


def test_evaluation_on_two_ranks_equals_one_to_the_last_digit(tmp_path, tiny_vit):
    flags = ["--model", tiny_vit, "--steps", 1, "--lr", 0, "--lam", 0]
    one = run("lipsum_ft.py", *flags, "--out", "one", cwd=tmp_path)
    two = torchrun(2, "lipsum_ft.py", "--finetuned", "one", "--out", "two", cwd=tmp_path)
    assert [r["tests"] for r in one["rows"]] == [r["tests"] for r in two["rows"]]  # 7,000 images, no duplicates


def test_batchnorm_on_two_ranks_is_evaluated_as_it_is_saved(tmp_path, tiny_resnet):
    flags = ["--model", tiny_resnet, "--steps", 6, "--batch-size", 8, "--lr", 1e-3, "--tests", "test", "--no-baseline"]
    trained = torchrun(2, "lipsum_ft.py", *flags, "--out", "r", cwd=tmp_path)
    saved = run("lipsum_ft.py", "--finetuned", "r", "--tests", "test", "--out", "again", cwd=tmp_path)
    assert saved["rows"][1]["name"] == "Lipsum-FT" and saved["rows"][1]["tests"] == trained["rows"][1]["tests"]


def test_five_kills_at_random_moments_leave_the_same_weights(tmp_path, tiny_vit):
    flags = ["--model", tiny_vit, "--steps", 300, "--batch-size", 8, "--save-every", 0, "--augment", "crop", "--tests",
             "test", "--no-baseline"]
    run("lipsum_ft.py", *flags, "--out", tmp_path / "whole")
    begun, rng, kills = command("lipsum_ft.py", *flags, "--out", tmp_path / "killed"), random.Random(0), 0
    while kills < 5:
        process = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        log, before = tmp_path / "killed" / "log.jsonl", 0
        while process.poll() is None and not (log.exists() and log.stat().st_mtime > time.time() - 1):
            time.sleep(0.02)  # until it trains
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        begun = command("lipsum_ft.py", "--resume", tmp_path / "killed")
        if process.returncode == 0:
            break
    assert kills >= 3, "the run was too short to be killed"
    run("lipsum_ft.py", "--resume", tmp_path / "killed")
    for name in ("open_clip_model.safetensors", "head.safetensors"):
        want, got = (common.load_tensors(tmp_path / d / name)[0] for d in ("whole", "killed"))
        assert all(torch.equal(want[k], got[k]) for k in want), name


def test_stop_signal_saves_and_tells_how_to_go_on(tmp_path, tiny_vit):
    process = subprocess.Popen(command("lipsum_ft.py", "--model", tiny_vit, "--steps", 100_000, "--out", tmp_path / "r",
                                       "--no-baseline"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "r" / "log.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert "stopped after step" in stderr and f"--resume {tmp_path / 'r'}" in stderr and "Traceback" not in stderr
    assert common.load_tensors(tmp_path / "r" / "last.ckpt")[1]["step"] > 0


def test_resume_needs_the_layout_of_the_parameters_and_the_same_stream(tmp_path):
    """Fused AdamW reads moments by the memory layout of the parameter, which files do not keep (channels_last)."""
    def parts():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), torch.amp.GradScaler("cpu", enabled=False)

    def step(model, optimizer, seed):
        model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole, again = parts(), parts()
    for seed in range(2):
        step(*whole[:2], seed)
    common.save_checkpoint(tmp_path / "last.ckpt", 2, *whole, [9, 4])
    assert common.load_checkpoint(tmp_path / "last.ckpt", *again, [9, 4]) == 2
    for model, optimizer, _ in (whole, again):
        step(model, optimizer, 2)
    assert torch.equal(whole[0].weight, again[0].weight)
    with pytest.raises(common.Fail, match="number of ranks"):
        common.load_checkpoint(tmp_path / "last.ckpt", *again, [9, 8])


def test_non_finite_loss_stops_and_names_its_files(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree")
    message = complaint("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--lr", 1e30, "--steps", 9,
                        "--batch-size", 4, "--warmup", 0, "--workers", 0, "--out", tmp_path / "r")
    files = list((tmp_path / "r").glob("nonfinite-step*.txt"))
    assert "step" in message and len(files) == 1 and str(files[0]) in message
    names = files[0].read_text().split()
    assert len(names) == 4 and all(os.path.isfile(n) for n in names)


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {Evil.path}",))


def test_crafted_checkpoints_are_refused_and_run_nothing(tmp_path, tiny_vit):
    Evil.path = tmp_path / "owned"
    run("lipsum_ft.py", "--model", tiny_vit, "--steps", 2, "--tests", "test", "--no-baseline", "--out", tmp_path / "r")
    (tmp_path / "r" / "last.ckpt").write_bytes(pickle.dumps(Evil()))
    assert "last.ckpt" in complaint("lipsum_ft.py", "--resume", tmp_path / "r")
    torch.save({"state_dict": Evil()}, tmp_path / "weights.pt")
    assert "weights.pt" in complaint("lipsum_ft.py", "--model", "ViT-B-32", "--pretrained", tmp_path / "weights.pt", "--out",
                                     tmp_path / "new")
    (tmp_path / "r" / "head.safetensors").write_bytes(pickle.dumps(Evil()))
    assert "head.safetensors" in complaint("wise_ft.py", "--finetuned", tmp_path / "r", "--out", tmp_path / "new2")
    assert not Evil.path.exists()


def test_table_of_mistakes(tmp_path, tiny_vit, tiny_resnet, monkeypatch):
    """Flags, trees, descriptions and runs that are wrong: one line each, exit code 2, nothing lost or left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tree = write_tree(tmp_path / "tree", train=4, test=2)
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit]
    run("lipsum_ft.py", *base, "--steps", 1, "--out", "done")
    (tmp_path / "done" / "notes.txt").write_text("precious")
    for name, text in (("list.json", "[]"), ("broken.json", "{'a': 1"), ("short.json", '{"red square": "x"}'),
                       ("number.json", '{"red square": 1, "green square": "x", "blue square": "y"}'),
                       ("other.json", '{"cat": "a", "green square": "x", "blue square": "y"}'),
                       ("long.json", json.dumps({"red square": "so " * 99, "green square": "x", "blue square": "y"}))):
        (tmp_path / name).write_text(text)
    copies = {}
    for change in ("no_test", "no_train", "empty_class", "text_as_jpg", "extra_class", "flat", "templates", "classnames", "shift_test",
                   "shift_held"):
        copies[change] = write_tree(tmp_path / change, train=2, test=1)
    (copies["no_test"] / "test").rename(copies["no_test"] / "tests")
    (copies["no_train"] / "train").rename(copies["no_train"] / "training")
    for f in (copies["empty_class"] / "train" / "red_square").iterdir():
        f.unlink()
    (copies["text_as_jpg"] / "test" / "red_square" / "000.jpg").write_text("no image")
    (copies["extra_class"] / "shifts" / "dark" / "pink_square").mkdir()
    for f in [p for p in (copies["flat"] / "test").rglob("*.jpg")]:
        f.rename(copies["flat"] / f"{f.parent.name}-{f.name}")
    (copies["shift_test"] / "shifts" / "dark").rename(copies["shift_test"] / "shifts" / "test")
    (copies["shift_held"] / "shifts" / "dark").rename(copies["shift_held"] / "shifts" / "held-out")
    (copies["templates"] / "templates.txt").write_text("a photo\n")
    (copies["classnames"] / "classnames.txt").write_text("nothing\there\n")
    at = lambda change: ["--data", "folder", "--data-dir", copies[change], "--model", tiny_vit]
    halves = {"part": '{"method": "lipsum_ft", "part_of": "done"}', "half": '{"method": "lipsum_ft", "data": "shapes"}',
              "few": '{"method": "wise_ft", "data": "shapes", "shots": 4, "seed": 0}', "torn": '{"method": "lips'}
    for name, text in halves.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(text)
    table = [
        ("lipsum_ft.py", ["--data", "imagnet"], "imagnet"), ("wise_ft.py", ["--data", "domainnets"], "domainnets"),
        ("vrf.py", ["--data", ""], "--data"), ("drm.py", ["--data", "x"], "shapes"),
        ("lipsum_ft.py", [*base, "--steps", 1, "--epochs", 1], "exclude"),
        *((s, [*base, f, v], f) for s in ("lipsum_ft.py",) for f, v in (
            ("--lr", -1), ("--lr", "nan"), ("--lr", "fast"), ("--wd", -0.1), ("--epochs", 0), ("--steps", 0), ("--steps", 1.5),
            ("--batch-size", 0), ("--accum", 0), ("--warmup", -1), ("--grad-clip", -1), ("--holdout", 1), ("--shots", -1),
            ("--workers", -2), ("--seed", -1), ("--lam", -1), ("--texts", 0), ("--text-length", 0), ("--alpha", 2),
            ("--augment", "mixup"), ("--freeze", "all"), ("--precision", "int8"), ("--limit", -5), ("--tests", "nope"),
            ("--shots", 10), ("--lra", 1), ("--save-every", -1))),
        ("lipsum_ft.py", [*base, "--text-length", 99], "--text-length"),
        ("lipsum_ft.py", [*base, "--device", "tpu9"], "--device"),
        ("lipsum_ft.py", at("shift_test"), "cannot have that name"), ("drm.py", [*base, "--prompt", "a {} or {}"], "--prompt"),
        ("wise_ft.py", ["--finetuned", "done", "--holdout", 0.5], "held-out images must be the same"),
        ("wise_ft.py", ["--finetuned", "done", "--pretrain-seed", 1], "the zero-shot model must be the same"),
        ("wise_ft.py", ["--finetuned", "done", "--model", "ViT-B-16"], "the zero-shot model must be the same"),
        ("wise_ft.py", ["--finetuned", "few", "--seed", 5], "the --shots images must be the same"),
        ("lipsum_ft.py", at("shift_held"), "cannot have that name"),
        ("lipsum_ft.py", ["--resume", "part"], "resume that"),
        ("wise_ft.py", [*base, "--alphas", 2], "--alphas"), ("wise_ft.py", [*base, "--select", "--holdout", 0], "--holdout"),
        ("vrf.py", [*base, "--a", 0], "--a"), ("vrf.py", [*base, "--b", 0], "--b"), ("vrf.py", [*base, "--k", -1], "--k"),
        ("vrf.py", [*base, "--holdout", 0, "--out", "v0"], "--holdout"), ("vrf.py", [*base, "--predict", tree], "--resume"),
        ("drm.py", [*base], "--descriptions"), ("drm.py", [*base, "--prompt", "x"], "--prompt"),
        *(("drm.py", [*base, "--descriptions", f], w) for f, w in (
            ("list.json", "list.json"), ("broken.json", "not valid JSON"), ("short.json", "1 descriptions"),
            ("number.json", "red square"), ("other.json", "red square"), ("long.json", "77"), ("missing.json", "not found"))),
        *(("lipsum_ft.py", at(c), w) for c, w in (
            ("no_test", "test"), ("no_train", "train"), ("empty_class", "red_square"), ("text_as_jpg", "000.jpg"),
            ("extra_class", "pink_square"), ("flat", "blue_square"), ("templates", "templates.txt"), ("classnames", "classnames.txt"))),
        ("lipsum_ft.py", ["--model", "ViT-B-99", *base[:4]], "ViT-B-99"),
        ("lipsum_ft.py", [*base[:4], "--model", "ViT-B-16"], "QuickGELU"),
        ("lipsum_ft.py", [*base[:4], "--model", "ViT-B-16", "--pretrained", "nope"], "nope"),
        ("lipsum_ft.py", [*base[:4], "--model", "ViT-B-16-quickgelu"], "could not be loaded"),
        ("lipsum_ft.py", [*base[:4], "--model", "hf-hub:nobody/nothing"], "could not be loaded"),
        ("lipsum_ft.py", [*base[:4], "--model", "local-dir:gone"], "gone"),
        ("lipsum_ft.py", [*base, "--out", "done"], "not empty"), ("lipsum_ft.py", [*base, "--out", "list.json"], "list.json"),
        ("lipsum_ft.py", ["--resume", "gone"], "gone"), ("lipsum_ft.py", ["--resume", "torn"], "not valid JSON"),
        ("wise_ft.py", ["--resume", "done"], "lipsum_ft.py"), ("lipsum_ft.py", ["--resume", "done", "--lam", 2], "--lam"),
        ("wise_ft.py", ["--finetuned", "half"], "not finished"), ("wise_ft.py", ["--finetuned", "gone"], "gone"),
        ("wise_ft.py", ["--finetuned", "done", "--model", tiny_resnet, "--out", "w"], "not a run of"),
        ("wise_ft.py", ["--finetuned", "done", "--data", "shapes", "--out", "w2"], "--data shapes"),
        ("drm.py", ["--finetuned", "done", "--descriptions", "d.json"], "d.json"),
    ]
    assert len(table) >= 40
    before = sorted(p.name for p in tmp_path.iterdir())
    for script, flags, words in table:
        message = complaint(script, *flags)
        assert words in message, (script, flags, message)
    assert (tmp_path / "done" / "notes.txt").read_text() == "precious"
    left = set(p.name for p in tmp_path.iterdir()) - set(before)
    assert not left, left
