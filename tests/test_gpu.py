"""Small runs on a CUDA GPU, skipped without one.

    TEST_GPU=1 python -m pytest -q tests/test_gpu.py    # conftest.py hides the GPU otherwise
"""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, run
from open_clip.transform import PreprocessCfg
from test_device import CASES, build, small_clip

import common

METHODS = ["wise_ft.py", "lipsum_ft.py", "vrf.py", "drm.py"]
STEPS = 300  # of a run that is stopped
SMALL = ["--limit", 200, "--batch-size", 32, "--warmup", 0]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def losses(out):
    """Losses of all log.jsonl below a run."""
    logs = sorted(out.rglob("log.jsonl"))
    return [json.loads(line)["loss"] for log in logs for line in log.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_does_not_wait_for_the_gpu(case):
    clip, labels = small_clip(case).to("cuda"), torch.tensor([0, 1, 2, 1, 0, 2])
    features_0, index = torch.randn(6, 32) / 6, torch.tensor([4, 1, 3, 2])
    pixels, y = torch.randint(256, (4, 3, 32, 32)).to("cuda"), labels[index].to("cuda")
    model, loss_fn = build(case, clip, features_0[:3].to("cuda"), labels, features_0)
    optimizer = torch.optim.AdamW(model.train().parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    try:
        for mode in ("default", "error"):  # the first step makes the optimizer's state
            torch.cuda.set_sync_debug_mode(mode)
            batch = common.Batch(common.normalized(pixels, PreprocessCfg()), y, index, 0)
            common.optimizer_step(model, loss_fn, [batch], optimizer, scaler, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("script", METHODS)
def test_precisions(script, tmp_path):
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        out = tmp_path / precision
        results = run(script, *SMALL, "--steps", 3, "--precision", precision, "--out", out)
        assert results["args"]["precision"] == precision
        found[precision] = losses(out)
        assert len(found[precision]) % 3 == 0
    for precision in ("bf16", "fp16"):
        assert found[precision] == pytest.approx(found["fp32"], rel=0.05)
    assert found["fp16"] == pytest.approx(found["bf16"], rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stopped_and_resumed(precision, tmp_path):
    """The same losses as without the stop, up to the order of a GPU's sums."""
    flags = ["--steps", STEPS, "--no-baseline", "--precision", precision]
    whole, part = tmp_path / "whole", tmp_path / "part"
    run("lipsum_ft.py", *flags, "--out", whole)
    process = subprocess.Popen(command("lipsum_ft.py", *flags, "--out", part),
                               stderr=subprocess.PIPE, text=True)
    log = part / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "--resume" in error, error
    done = len(losses(part))
    assert 0 < done < STEPS
    run("lipsum_ft.py", "--resume", part)
    resumed, straight = losses(part), losses(whole)
    assert len(resumed) == len(straight) == STEPS
    assert resumed[:20] == pytest.approx(straight[:20], rel=0.05)
    assert sum(resumed[done:]) == pytest.approx(sum(straight[done:]), rel=0.1)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="the ranks would have a GPU each")
def test_two_ranks_on_one_gpu_are_refused(tmp_path):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*SMALL, "--steps", 3, "--out", tmp_path / "run"]
    done = subprocess.run([*ranks, str(ROOT / "lipsum_ft.py"), *map(str, flags)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "rank 1 of this machine has no CUDA GPU" in done.stderr
    assert not (tmp_path / "run").exists()
