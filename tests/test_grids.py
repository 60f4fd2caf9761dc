"""The number of kept patches, for every grid and in exported programs."""
from fractions import Fraction

import pytest
import timm
import torch
from helpers import build, images

from timm_evovit import evolve, find_slow_tokens
from timm_evovit.tokens import as_fraction, num_kept


def test_number_of_kept_patches():
    """The exact product of n and the decimal, rounded down, also where that of floats is too small."""
    for percent in range(1, 100):
        ratio = as_fraction(percent / 100)
        assert all(num_kept(n, ratio) == max(1, n * percent // 100) for n in range(1, 4097))


def test_ratios_as_they_were_written():
    assert as_fraction(0.7) == (7, 10) and as_fraction(1) == (1, 1) and as_fraction(0.123456) == (1929, 15625)
    assert as_fraction(1 / 3) == (1, 3) and num_kept(6, as_fraction(1 / 3)) == 2
    assert as_fraction(Fraction(2, 7)) == (2, 7)
    assert num_kept(3, as_fraction(0.01)) == 1
    assert num_kept(10 ** 6, as_fraction(0.999999999999)) == 999999


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs, keep_ratio', [
    ('evo_deit_tiny', dict(keep_ratio=0.7), None),
    ('evo_deit_tiny', dict(selection='layer', representative_token=True), None),
    ('vit_tiny_patch16_224', dict(depth=7), 0.4),  # four stages, one of about half of the tokens
    ('eva02_tiny_patch14_224', {}, 0.6),
])
def test_one_exported_program_for_every_size(name, kwargs, keep_ratio):
    """torch.export and ONNX Runtime with dynamic batch, height and width agree with the model, away from the traced size."""
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    model = build(name, **{'depth': 3, 'dynamic_img_size': True, **kwargs})
    model = model if keep_ratio is None else evolve(model, keep_ratio)
    x = images(2, 64)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,))
    exported, onnx = program.module(), torch.onnx.export(program, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    for batch, size in ((2, (64, 64)), (3, (80, 72)), (1, (16, 120)), (4, (32, 32)), (2, (240, 40))):
        y = images(batch, size)
        with torch.no_grad():
            expected = model(y)
            torch.testing.assert_close(exported(y), expected, rtol=1e-4, atol=1e-5)
        found, = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_find_slow_tokens_of_a_feature_backbone():
    x = images(2, 32)
    for model in (
            timm.create_model('evo_deit_tiny', img_size=32, patch_size=8, features_only=True),
            evolve(timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, features_only=True))):
        found = find_slow_tokens(model, x)
        assert found and [t.mask.shape for t in found] == [(2, 4, 4)] * len(found)
        for t, expected in zip(found, find_slow_tokens(model.model, x)):
            assert t.block == expected.block and torch.equal(t.mask, expected.mask)
