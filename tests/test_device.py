"""Training and evaluation on a simulated second device: fails where a tensor is left on the CPU,
and where a step makes the host wait for the device, to read a value or a size or to copy."""
import copy
import json
from contextlib import contextmanager

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from tests.conftest import TEXT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common
import drm
import lipsum_ft
import vrf
import wise_ft

# Of drm: targets, erm, descriptions a class
CASES = [("wise_ft",), ("lipsum_ft",), ("drm", "paper", "flyp", 1), ("drm", "softmax", "ce", 3),
         ("drm", "onehot", "flyp", 2), ("drm", "onehot", "ce", 1, "not read at EOT")]
aten, VISION = torch.ops.aten, dict(image_size=32, patch_size=8, width=64, head_width=32, layers=2)
NAMES, TOKENIZER = ["cat", "dog", "red car"], open_clip.SimpleTokenizer()
INDEXING = {aten.index.Tensor, aten.index_put.default}  # the index may be on the CPU
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
            aten.convolution.default, aten.convolution_backward.default}
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default,
           aten.unique_dim.default, aten.unique_consecutive.default, aten.equal.default,
           aten.masked_select.default, aten.bincount.default, aten.repeat_interleave.Tensor}


class There(torch.Tensor):
    """Claims to be on the device "meta" and computes on the CPU with what it holds."""

    may_wait, half = True, False

    @staticmethod
    def __new__(cls, held):
        how = dict(strides=held.stride(), dtype=held.dtype, device="meta")
        there = torch.Tensor._make_wrapper_subclass(cls, held.shape, **how)
        there.held = held
        return there

    def tolist(self):  # torch has none for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        kwargs, device = dict(kwargs or {}), (kwargs or {}).get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, cls) for x in tensors)
        strict = args[:1] if f in INDEXING else tensors
        here = any(not isinstance(x, cls) and x.ndim for x in strict)  # scalars may go along
        assert not (there and here), f"{f}: tensors on two devices"
        goes = device is not None and torch.device(device).type == "meta"
        moves = device is not None and tensors and there != goes
        waits = there and f in READING or moves and (there or not kwargs.get("non_blocking"))
        for index in args[1] if f in INDEXING and isinstance(args[0], cls) else []:
            waits |= index is not None and (not isinstance(index, cls) or index.dtype == torch.bool)
        assert cls.may_wait or not waits, f"{f}: the host waits for the device"
        if device is not None:
            there, kwargs["device"] = goes, "cpu"
        args, kwargs, given = *tree_map_only(cls, lambda x: x.held, (args, kwargs)), args
        if f in PRODUCTS:  # in a backward pass the operands are of before and after a cast
            mixed = len({x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor)}) > 1
            if cls.half or mixed and not torch.is_grad_enabled():
                args = tree_map_only(torch.Tensor, torch.Tensor.bfloat16, args)
        result = f(*args, **kwargs)
        if f._schema.is_mutable:
            return given[0]
        return tree_map_only(torch.Tensor, cls, result) if there else result


class SecondDevice(TorchDispatchMode):
    def __torch_dispatch__(self, *args):
        return There.__torch_dispatch__(*args)


class Autocast:
    """In the place of torch.autocast, which does not know "meta"."""

    def __init__(self, device, dtype, enabled):
        assert device == "meta"
        self.half = enabled

    def __enter__(self):
        There.half = self.half

    def __exit__(self, *_):
        There.half = False


def moving(make):
    """torch.tensor with device="meta" would leave the values out."""
    def moved(*args, device=None, **kwargs):
        return make(*args, **kwargs).to(device or "cpu")
    return moved


@contextmanager
def second_device():
    with pytest.MonkeyPatch.context() as patch, SecondDevice():
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(common, "DEVICE", torch.device("meta"))
        patch.setattr(common, "save_checkpoint", lambda *_: None)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, moving(getattr(torch, name)))
        yield


def build(case, amp=None, accum=1):
    """(setup, zero-shot model, loss_fn) of a case on common.DEVICE, as the methods make them."""
    torch.manual_seed(0)
    other = dict(no_causal_mask=True, pool_type="last") if case[-1] == "not read at EOT" else {}
    clip = open_clip.CLIP(32, VISION, {**TEXT, **other}).to(common.DEVICE).eval()
    pixels = np.random.default_rng(0).integers(256, size=(20, 40, 40, 3), dtype=np.uint8)
    images = common.ImageSet("train", pixels, np.arange(20) % 3)
    images.prepare(PreprocessCfg(size=32))
    flags = f"--steps 3 --batch-size 4 --accum {accum} --warmup 0 --grad-clip 1 --workers 0"
    data = common.Data(NAMES, ["a photo of a {}"], images, [], {})
    setup = common.Setup(common.parser("").parse_args(flags.split()), data, clip, TOKENIZER, amp)
    model = common.ImageClassifier(clip.visual, setup.head, setup.scale, True, amp).eval()
    if case[0] == "wise_ft":
        return setup, model, wise_ft.cross_entropy
    if case[0] == "lipsum_ft":
        return setup, model, lipsum_ft.make_loss(clip, model, TOKENIZER, 1.0, 5, 3, 0)
    targets, erm, n = case[1:4]
    features_0 = common.features_of(model, images, setup)
    df, cd = ([[f"a {'very ' * i}good {name}" for i in range(m)] for name in NAMES] for m in (1, n))
    model = drm.DualPrompts(clip, drm.encode(df, setup), drm.encode(cd, setup), 3, amp).eval()
    return setup, model, drm.make_loss(1.0, features_0, images.labels, model.heads()[1],
                                       setup.scale, targets, 1.0, erm)


def train(case, amp, accum, out, forbid, allow):
    """Train for three steps. The host may wait in the first, which makes AdamW's moments, and
    where the log is written, after the last."""
    setup, model, loss_fn = build(case, amp, accum)
    write_log = common.write_log

    def strict(forward, batch):
        if batch.step:
            forbid()
        return loss_fn(forward, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "write_log", lambda *about: (allow(), write_log(*about)))
        patch.setattr(common, "pyplot", lambda: None)
        common.train(model, strict, setup, out)
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(tmp_path, monkeypatch, case, amp, accum):
    def may_wait(value):
        monkeypatch.setattr(There, "may_wait", value)
    with second_device():
        there = train(case, amp, accum, tmp_path, lambda: may_wait(False), lambda: may_wait(True))
    here = train(case, amp, accum, tmp_path / "here", int, int)
    assert there == pytest.approx(here, rel=0.05 if amp else 1e-5)


def evaluation():
    """{row: number} of all that the methods evaluate, on common.DEVICE."""
    setup, dual, _ = build(CASES[2])
    zero_shot = build(CASES[0])[1]
    tuned = copy.deepcopy(zero_shot)
    tuned.head.data.neg_()
    bank = vrf.failures_of(zero_shot, tuned, setup)
    distance, grid = vrf.distance_to(bank, 1, "l2"), [(1.0, 0.5)]
    rows = [common.each({"one": tuned}), wise_ft.all_alphas(zero_shot, tuned, [0, 0.5, 1]),
            vrf.table_rows(zero_shot, tuned, distance, vrf.ensemble, 0.5, grid),
            drm.three_rows({"DRM": dual}, 0.5)]
    test = setup.data.train
    sets = {"all": test, "two": test.but(classes=torch.tensor([[0, 1], [2, 2]]), labels=test.labels // 2)}
    found = {}
    for own in rows:
        for row, tests in common.evaluate(own, setup, sets).items():
            for name, x in tests.items():
                found[row, name] = x["nll"] if isinstance(x, dict) else x.double().mean().item()
    return found


def test_evaluation():
    with second_device():
        there = evaluation()
    assert there == pytest.approx(evaluation(), rel=1e-5) and len(there) > 40
