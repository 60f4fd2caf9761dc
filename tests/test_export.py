"""Compiled with any batch size, and exported to ONNX: the same outputs from the same informative tokens."""
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounter

from timm_evovit import evolve, informative_tokens
from timm_evovit.base import InformativeTokens

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))
import export_onnx  # noqa: E402

SMALL = dict(num_classes=10, img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)
LEVIT = dict(num_classes=10, img_size=96, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(3, 1, 1))
MODELS = {
    'deit': lambda: timm.create_model('evo_deit_tiny', **SMALL),
    'deit, layer-wise, representative token': lambda: timm.create_model(
        'evo_deit_tiny', selection='layer', representative_token=True, **SMALL),
    'levit': lambda: timm.create_model('evo_levit_128s', **LEVIT),
    'evolved': lambda: evolve(timm.create_model('vit_small_patch14_reg4_dinov2', init_values=0.5, **SMALL)),
}


def build(name):
    """A small model with weights large enough that tokens differ in rank."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if 'pos_embed' in key or 'token' in key:
                p.normal_(std=0.5)
            elif p.ndim > 1:
                p.normal_(std=(2 if 'qkv' in key else 0.5) / math.sqrt(p[0].numel()))
            elif p.ndim == 1 and key.endswith('weight'):
                p.uniform_(0.5, 1.5)
    return model


def images(model, batch, seed=0):
    size = export_onnx.image_size(model)
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('name', MODELS)
def test_one_graph_for_every_batch_size(name, training):
    torch._dynamo.reset()
    model = build(name).train(training)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 8, 5):
        x = images(model, batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize('dynamo', [True, False], ids=['torch.export', 'TorchScript'])
@pytest.mark.parametrize('name', MODELS)
def test_onnx(name, dynamo, tmp_path):
    model = reparameterize_model(build(name))
    path = tmp_path / 'model.onnx'
    if dynamo:
        export_onnx.export(model, export_onnx.image_size(model), path)
    else:  # what timm's onnx_export.py uses with PyTorch before 2.9
        torch.onnx.export(
            model, (images(model, 2),), path, dynamo=False, input_names=['images'], output_names=['logits'],
            dynamic_axes={'images': {0: 'batch'}, 'logits': {0: 'batch'}})
    session = onnxruntime.InferenceSession(export_onnx.with_selections(path))
    for batch in (1, 2, 5):
        x = images(model, batch, seed=batch)
        logits, *kept = session.run(None, {'images': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)
        found = informative_tokens(model, x)
        assert len(kept) == len(found) >= 2
        for indices, t in zip(kept, found):
            assert [sorted(row) for row in indices.tolist()] == [
                m.flatten().nonzero().flatten().tolist() for m in t.mask]


def test_check_finds_another_model(tmp_path, monkeypatch):
    model, path = build('deit'), tmp_path / 'model.onnx'
    size = export_onnx.image_size(model)
    export_onnx.export(model, size, path)
    assert export_onnx.check(model, size, path).selections == 6
    with torch.no_grad():
        model.head.bias[0] += 0.1
    with pytest.raises(RuntimeError, match='logits differ by'):
        export_onnx.check(model, size, path)
    with torch.no_grad():
        model.head.bias[0] -= 0.1
        model.blocks[0].attn.qkv.weight.view(3, -1)[1].mul_(-1)  # keys alone: queries as well would change nothing
    with pytest.raises(RuntimeError, match=r'tokens in [1-6] of 6 selections'):
        export_onnx.check(model, size, path)
    with monkeypatch.context() as patch:
        patch.setattr(export_onnx, 'TIE', math.inf)  # whatever differs is a tie
        with pytest.raises(RuntimeError, match='in every image'):
            export_onnx.check(model, size, path)
    model.set_keep_ratio(1)
    with pytest.raises(RuntimeError, match='selects tokens 2 times, the model 0 times'):
        export_onnx.check(model, size, path)


def test_rounding_may_decide_between_patches_that_tie():
    mask = torch.tensor([[[True, True], [False, False]]]).repeat(3, 1, 1)
    attention = torch.tensor([[[0.4, 0.2], [0.2 * (1 - 1e-6), 0.1]]]).repeat(3, 1, 1)
    tokens = [InformativeTokens(1, mask, attention)] * 2
    same, tie, other = [1, 0], [0, 2], [0, 3]
    for kept, differing, tied in (
            ([[same, same, same]] * 2, 0, [False, False, False]),
            ([[same, tie, same], [same, other, same]], 0, [False, True, False]),
            ([[same, tie, other], [other, same, same]], 2, [False, True, False]),
    ):
        found = export_onnx.compare_tokens(tokens, [np.array(k) for k in kept], 3)
        assert (found[0], found[1].tolist()) == (differing, tied)


def test_int8_is_close(tmp_path):
    model, path, small = build('deit'), tmp_path / 'model.onnx', tmp_path / 'model.int8.onnx'
    export_onnx.export(model, export_onnx.image_size(model), path)
    export_onnx.quantize(path, small)
    x = images(model, 8)
    exact, rounded = (export_onnx.session(str(p))(x)[0] for p in (path, small))
    assert not np.array_equal(exact, rounded)
    assert np.corrcoef(exact.flatten(), rounded.flatten())[0, 1] > 0.9
    assert small.stat().st_size < 0.7 * path.stat().st_size
