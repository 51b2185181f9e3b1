"""Training and evaluation on a simulated second device: fails where a tensor is left on the CPU,
and where a step makes the host wait for the device, to read a value or a size or to copy."""
import copy
import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common
import drm
import lipsum_ft
import vrf
import wise_ft
from tests import shapes

# Of drm: targets, erm, descriptions a class, whether its text tower is causal and read at EOT
CASES = [("wise_ft",), ("lipsum_ft",), ("drm", "paper", "flyp", 1, True),
         ("drm", "softmax", "ce", 3, True), ("drm", "onehot", "flyp", 2, False)]
TOKENIZER, aten = open_clip.SimpleTokenizer(context_length=20), torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_}  # the index may be on the CPU
READING = {aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.unique_dim, aten.equal,
           aten.unique_consecutive, aten.masked_select, aten.bincount, aten.repeat_interleave}


class There(torch.Tensor):
    """Claims to be on the device "meta" and computes on the CPU with what it holds."""

    may_wait = True

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
        goes = torch.device(device or "cpu").type == "meta"
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, cls) for x in tensors)
        indexing = f.overloadpacket in INDEXING
        strict = args[:1] if indexing else tensors
        here = any(not isinstance(x, cls) and x.ndim for x in strict)  # scalars may go along
        assert not (there and here), f"{f}: tensors on two devices"
        waits = there and f.overloadpacket in READING
        if device and tensors and there != goes:  # a copy
            waits = there or not kwargs.get("non_blocking")
        for index in args[1] if indexing and isinstance(args[0], cls) else []:
            waits |= index is not None and (not isinstance(index, cls) or index.dtype == torch.bool)
        assert cls.may_wait or not waits, f"{f}: the host waits for the device"
        if device:
            there, kwargs["device"] = goes, "cpu"
        args, kwargs, given = *tree_map_only(cls, lambda x: x.held, (args, kwargs)), args
        result = f(*args, **kwargs)
        if f._schema.is_mutable:
            return given[0]
        return tree_map_only(torch.Tensor, cls, result) if there else result


class SecondDevice(TorchDispatchMode):  # for what is made there from no tensor
    def __torch_dispatch__(self, *args):
        return There.__torch_dispatch__(*args)


@contextmanager
def second_device():
    with pytest.MonkeyPatch.context() as patch, SecondDevice():
        # On "meta" as_tensor would drop the values; autocast does not know it: all stays fp32.
        patch.setattr(torch, "as_tensor", lambda x, device="cpu", make=torch.as_tensor, **how:
                      make(x, **how).to(device))
        patch.setattr(torch, "autocast", lambda device, *_, **__: {"meta": nullcontext()}[device])
        patch.setattr(common, "DEVICE", torch.device("meta"))
        patch.setattr(common, "save_checkpoint", lambda *_: None)
        yield


def build(case, amp=None, accum=1):
    """(setup, zero-shot model, loss_fn) of a case on common.DEVICE, as the methods make them."""
    clip, images = shapes.shapes_clip(common.DEVICE), shapes.shapes_split("train", None, 1, 20)
    if case[-1] is False:
        clip.attn_mask, clip.text_pool_type = None, "last"
    images.prepare(PreprocessCfg(size=32))
    flags = dict(steps=3, batch_size=4, accum=accum, warmup=0, grad_clip=1.0, workers=0)
    args = SimpleNamespace(**{**common.parser("").defaults, **flags})
    data = common.Data(list(shapes.SHAPES), ["a photo of a {}"], images, [], {})
    setup = common.Setup(args, data, clip, TOKENIZER, amp)
    model = common.ImageClassifier(clip.visual, setup.head, setup.scale, True, amp).eval()
    if case[0] == "wise_ft":
        return setup, model, wise_ft.cross_entropy
    if case[0] == "lipsum_ft":
        return setup, model, lipsum_ft.make_loss(clip, model, TOKENIZER, 1.0, 5, 3, 0)
    _, targets, erm, n, _ = case
    df, cd = (drm.encode([["very " * i + name for i in range(m)] for name in data.classnames],
                         setup) for m in (1, n))
    dual = drm.DualPrompts(clip, df, cd, 12, amp).eval()
    about_0 = common.features_of(model, images, setup), images.labels, dual.heads()[1], setup.scale
    return setup, dual, drm.make_loss(1.0, *about_0, targets, 1.0, erm)


def train(case, amp, accum, out, waits):
    """Losses of three steps. waits("error") before the second: the first makes what AdamW keeps;
    waits("default") where the log is written, after the last."""
    (setup, model, loss_fn), write_log = build(case, amp, accum), common.write_log

    def strict(forward, batch):
        if batch.step:
            waits("error")
        return loss_fn(forward, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "write_log", lambda *about: (waits("default"), write_log(*about)))
        patch.setattr(common, "new_figure", lambda *_: None)
        common.train(model, strict, setup, out)
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


@pytest.mark.parametrize("amp, accum", [(None, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(tmp_path, monkeypatch, case, amp, accum):
    with second_device():
        there = train(case, amp, accum, tmp_path / "there",
                      lambda mode: monkeypatch.setattr(There, "may_wait", mode == "default"))
    here = train(case, amp, accum, tmp_path / "here", str)
    assert there == pytest.approx(here, rel=0.05 if amp else 1e-5)


def evaluation():
    """All numbers of all that the methods evaluate, on common.DEVICE."""
    setup, dual, _ = build(CASES[2])
    tuned, images = build(CASES[0])[1], setup.data.train
    model = copy.deepcopy(tuned)
    model.head.data.neg_()  # fails on what the other gets right
    bank = vrf.failures_of(model, tuned, setup)
    assert len(bank)
    distance = vrf.distance_to(bank, 1, "l2")
    every = [common.each({"one": tuned}), wise_ft.all_alphas(model, tuned, [0, 0.5, 1]),
             vrf.table_rows(model, tuned, distance, vrf.ensemble, 0.5, [(1.0, 0.5)]),
             drm.three_rows({"DRM": dual}, 0.5)]
    two = images.but(classes=torch.arange(12).view(2, 6), labels=images.labels // 6)
    found = [common.evaluate(rows, setup, {"all": images, "two": two}) for rows in every]
    return [float(torch.as_tensor(x).double().mean()) for x in tree_leaves(found)]


def test_evaluation():
    with second_device():
        there = evaluation()
    assert there == pytest.approx(evaluation(), rel=1e-5, nan_ok=True)  # classes without images
