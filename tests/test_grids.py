"""The number of kept patches, for every grid and in exported programs."""
from fractions import Fraction

import pytest
import torch
from helpers import build, images

from timm_evovit import evolve, informative_tokens
from timm_evovit.evolution import as_fraction, num_kept

# ratio in percent, and the numbers of patches n up to 4,096 where int(n * ratio) is one less than the exact product
EXCEPTIONS = {
    29: [100, 200, 400, 800, 1500, 1600, 1700, 2900, 3000, 3100, 3200, 3300, 3400, 3500],
    35: [180, 340, 360, 660, 680, 700, 720, 1300, 1320, 1340, 1360, 1380, 1400, 1420, 1440, 1460, 2580, 2600, 2620,
         2640, 2660, 2680, 2700, 2720, 2740, 2760, 2780, 2800, 2820, 2840, 2860, 2880, 2900, 2920],
    41: [300, 600, 1200, 2400],
    57: [100, 200, 300, 400, 600, 700, 800, 1200, 1300, 1400, 1500, 1600, 1700, 2400, 2500, 2600, 2700, 2800, 2900,
         3000, 3100, 3200, 3300, 3400, 3500],
    58: [50, 100, 200, 400, 750, 800, 850, 1450, 1500, 1550, 1600, 1650, 1700, 1750, 2850, 2900, 2950, 3000, 3050,
         3100, 3150, 3200, 3250, 3300, 3350, 3400, 3450, 3500],
    69: [300, 600, 700, 1100, 1200, 1300, 1400, 2200, 2300, 2400, 2500, 2600, 2700, 2800, 2900],
    70: [90, 170, 180, 330, 340, 350, 360, 650, 660, 670, 680, 690, 700, 710, 720, 730, 1290, 1300, 1310, 1320,
         1330, 1340, 1350, 1360, 1370, 1380, 1390, 1400, 1410, 1420, 1430, 1440, 1450, 1460, 2570, 2580, 2590,
         2600, 2610, 2620, 2630, 2640, 2650, 2660, 2670, 2680, 2690, 2700, 2710, 2720, 2730, 2740, 2750, 2760,
         2770, 2780, 2790, 2800, 2810, 2820, 2830, 2840, 2850, 2860, 2870, 2880, 2890, 2900, 2910, 2920],
    82: [150, 300, 600, 1200, 2350, 2400, 2450],
    94: [2150],
}


def test_number_of_kept_patches():
    """The exact product of n and the decimal, rounded down; where int(n * ratio) differs, a float made that too small."""
    exceptions = {}
    for percent in range(1, 100):
        ratio = percent / 100
        for n in range(1, 4097):
            kept = num_kept(n, as_fraction(ratio))
            assert kept == max(1, n * percent // 100)
            if kept != max(1, int(n * ratio)):
                assert kept == int(n * ratio) + 1 and n * percent % 100 == 0
                exceptions.setdefault(percent, []).append(n)
    assert exceptions == EXCEPTIONS
    for n in (16, 36, 49, 144, 196, 576):  # grids of the paper: as before for every ratio of two decimals
        assert not any(n in numbers for numbers in exceptions.values())


def test_ratios_as_they_were_written():
    assert as_fraction(0.7) == (7, 10) and as_fraction(1) == (1, 1) and as_fraction(0.123456) == (1929, 15625)
    assert as_fraction(1 / 3) == (1, 3) and num_kept(6, as_fraction(1 / 3)) == 2
    assert as_fraction(Fraction(2, 7)) == (2, 7)
    assert num_kept(3, as_fraction(0.01)) == 1
    assert num_kept(10 ** 6, as_fraction(0.999999999999)) == 999999


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs', [
    ('evo_deit_tiny', dict(keep_ratio=0.7)),
    ('evo_deit_tiny', dict(selection='layer', representative_token=True)),
    ('vit_tiny_patch16_224', {}),
    ('vit_tiny_patch16_224', dict(slow_tokens='attention')),
    ('eva02_tiny_patch14_224', dict(slow_tokens='attention')),
    ('eva02_tiny_patch14_224', {}),
])
def test_one_exported_program_for_every_size(name, kwargs):
    """torch.export and ONNX Runtime with dynamic batch, height and width agree with the model, away from the traced size."""
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    evolving = name.startswith('evo')
    model = build(name, dynamic_img_size=True, **(kwargs if evolving else {}))
    model = model if evolving else evolve(model, **kwargs)
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


def test_informative_tokens_of_a_feature_backbone():
    import timm
    x = images(2, 32)
    for model in (
            timm.create_model('evo_deit_tiny', img_size=32, patch_size=8, features_only=True),
            evolve(timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, features_only=True))):
        found = informative_tokens(model, x)
        assert found and [t.mask.shape for t in found] == [(2, 4, 4)] * len(found)
        for t, expected in zip(found, informative_tokens(model.model, x)):
            assert t.block == expected.block and torch.equal(t.mask, expected.mask)
