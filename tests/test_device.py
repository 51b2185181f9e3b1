"""Losses on a simulated second device: fails where a tensor is left on the CPU, and where the host
would wait for the device: to read a value or a size from it, or in a copy that blocks."""
from contextlib import nullcontext
from types import SimpleNamespace

import open_clip
import pytest
import torch
from conftest import TEXT
from open_clip.transform import PreprocessCfg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common
import drm
import lipsum_ft
import vrf
import wise_ft

CASES = [("wise_ft",), ("lipsum_ft", True), ("lipsum_ft", False), ("drm", "paper", "flyp"),
         ("drm", "softmax", "ce"), ("drm", "onehot", "flyp"), ("drm", "onehot", "ce", "no EOT")]
aten, VISION = torch.ops.aten, dict(image_size=32, patch_size=8, width=64, head_width=32, layers=2)
INDEXING = {aten.index.Tensor, aten.index_put.default}  # the index may be on the CPU
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default,
           aten.masked_select.default, aten.bincount.default}


class There(torch.Tensor):
    """Claims to be on the device "meta" and computes on the CPU with what it holds."""

    may_wait = True

    @staticmethod
    def __new__(cls, held):
        how = dict(strides=held.stride(), dtype=held.dtype, device="meta")
        there = torch.Tensor._make_wrapper_subclass(cls, held.shape, **how)
        there.held = held
        return there

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        kwargs, device = dict(kwargs or {}), (kwargs or {}).get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, cls) for x in tensors)
        strict = args[:1] if f in INDEXING else tensors
        here = any(not isinstance(x, cls) and x.ndim for x in strict)  # scalars may go along
        assert not (there and here), f"{f}: tensors on two devices"
        blocking = device is not None and tensors and not kwargs.get("non_blocking")
        waits = there and f in READING or blocking and not there
        for index in args[1] if f in INDEXING and isinstance(args[0], cls) else []:
            waits |= index is not None and (not isinstance(index, cls) or index.dtype == torch.bool)
        assert cls.may_wait or not waits, f"{f}: the host waits for the device"
        if device is not None:
            there, kwargs["device"] = torch.device(device).type == "meta", "cpu"
        args, kwargs, given = *tree_map_only(cls, get_held, (args, kwargs)), args
        result = f(*args, **kwargs)
        if f._schema.is_mutable:
            return given[0]
        return tree_map_only(torch.Tensor, cls, result) if there else result


def get_held(x):
    return x.held


class SecondDevice(TorchDispatchMode):
    def __torch_dispatch__(self, *args):
        return There.__torch_dispatch__(*args)


def moving(make):
    """torch.tensor with device="meta" would leave the values out."""
    def moved(*args, device=None, **kwargs):
        return make(*args, **kwargs).to(device or "cpu")
    return moved


def build(case, clip, head, labels, features_0):
    """(model, loss_fn) of a case."""
    tokenizer = SimpleNamespace(sot_token_id=49406, eot_token_id=49407)
    model = common.ImageClassifier(clip.visual, head, 100.0, bias=True)
    if case[0] == "wise_ft":
        return model, wise_ft.make_loss()
    if case[0] == "lipsum_ft":
        cached = features_0 if case[1] else None
        return model, lipsum_ft.make_loss(clip, model, tokenizer, 1.0, 5, 3, 0, cached)
    tokens = torch.tensor([[49406, 7 + c, 49407] + [0] * 74 for c in range(3)])
    texts = drm.Texts(tokens, torch.arange(3))
    loss_fn = drm.make_loss(1.0, features_0, labels, head, 100.0, targets=case[1], erm=case[2])
    return drm.DualPrompts(clip, texts, texts, 3), loss_fn


def small_clip(case):
    other = dict(no_causal_mask=True, pool_type="last") if case[-1] == "no EOT" else {}
    return open_clip.CLIP(embed_dim=32, vision_cfg=VISION, text_cfg={**TEXT, **other})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_device(monkeypatch, case):
    """As train() does it: all is on the device but a Batch's index and features_0."""
    monkeypatch.setattr(torch, "autocast", nullcontext_of)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, moving(getattr(torch, name)))
    clip = small_clip(case)
    with SecondDevice():
        features_0, labels = torch.randn(6, 32) / 6, torch.tensor([0, 1, 2, 1, 0, 2])
        index, pixels = torch.tensor([4, 1, 3, 2]), torch.randint(256, (4, 3, 32, 32)).to("meta")
        y = labels[index].to("meta")
        model, loss_fn = build(case, clip.to("meta"), features_0[:3].to("meta"), labels, features_0)
        optimizer = torch.optim.AdamW(model.train().parameters())
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        monkeypatch.setattr(There, "may_wait", False)
        batch = common.Batch(common.normalized(pixels, PreprocessCfg()), y, index, 0)
        losses = common.optimizer_step(model, loss_fn, [batch], optimizer, scaler, 1.0)
        monkeypatch.setattr(There, "may_wait", True)
        assert all(isinstance(value, There) for value in losses.values())
        d = vrf.distances(features_0, features_0[:4], 2, "squared", torch.device("meta"))
        z = d[:4, None] * batch.labels
        vrf.ensemble(z, z, vrf.ft_weight(d[:4]), 1.0, 2.0)
        common.image_scores(common.log_mixture(z, z, 0.5), batch.labels)


def nullcontext_of(*_, **__):
    """In the place of torch.autocast, which does not know "meta"."""
    return nullcontext()
