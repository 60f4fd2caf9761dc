"""Compiled with any batch size, as TorchScript and FX graphs, and exported to ONNX: the same outputs from the same tokens."""
import functools

import onnxruntime
import pytest
import timm
import torch
from helpers import TINY, TINY_LEVIT, images_for, randomize
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounter
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from timm_evovit import evolve, find_slow_tokens

SMALL = dict(TINY, depth=3)
LEVIT = dict(TINY_LEVIT, img_size=96, key_dim=8, depth=(3, 1, 1))
MODELS = {
    'deit': lambda: timm.create_model('evo_deit_tiny', **SMALL),
    'deit, layer-wise, representative token': lambda: timm.create_model(
        'evo_deit_tiny', selection='layer', representative_token=True, **SMALL),
    'levit': lambda: timm.create_model('evo_levit_128s', **LEVIT),
    'evolved': lambda: evolve(timm.create_model('vit_small_patch14_reg4_dinov2', init_values=0.5, **SMALL), 0.4),
    'no class token': lambda: evolve(timm.create_model('vit_base_patch16_siglip_224', **SMALL)),
    'dinov3': lambda: evolve(timm.create_model('vit_small_patch16_dinov3', **SMALL)),
    'mixed rope': lambda: evolve(timm.create_model('vit_base_patch16_rope_mixed_224', **SMALL)),
}


def create(name):
    torch.manual_seed(0)
    return randomize(MODELS[name]()).eval()


@pytest.mark.slow
@pytest.mark.parametrize('name, training', [
    *((name, False) for name in MODELS), ('deit', True), ('levit', True)])  # the others train with the same graph
def test_one_graph_for_every_batch_size(name, training):
    torch._dynamo.reset()
    model = create(name).train(training)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 8, 5):
        x = images_for(model, batch)
        with torch.no_grad():
            found = []
            for m in (compiled, model):
                torch.manual_seed(0)  # the same heads
                found.append(m(x))
            torch.testing.assert_close(*found)
    assert counter.frame_count == 1


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_script_and_fx(name):
    """TorchScript has the graph of evaluation mode, also of a model that trains, which stays in its own mode."""
    model = create(name)
    x = images_for(model, 5)
    expected = model(x)
    node = get_graph_node_names(model)[1][-1]
    torch.testing.assert_close(create_feature_extractor(model, [node])(x)[node], expected)
    scripted = torch.jit.script(model.train())
    assert all(m.training for m in model.modules())
    scripted.eval()
    torch.testing.assert_close(scripted(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match='model must evolve'):
        find_slow_tokens(scripted, x)


@pytest.mark.parametrize('build', [
    lambda **kwargs: timm.create_model('evo_deit_tiny', **kwargs),
    lambda **kwargs: evolve(timm.create_model('vit_base_patch16_siglip_224', **kwargs)),
    lambda **kwargs: evolve(timm.create_model('eva02_tiny_patch14_224', **kwargs))], ids=['evo_deit', 'siglip', 'eva02'])
@torch.no_grad()
def test_script_of_any_size(build):
    """TorchScript of a model whose position embeddings are resampled, on the size it was built for and another one."""
    model = randomize(build(dynamic_img_size=True, **SMALL)).eval()
    patch = model.patch_embed.patch_size[0]
    scripted = torch.jit.script(model)
    for height, width in (model.patch_embed.img_size, (5 * patch, 3 * patch)):
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name, dynamo', [  # test_grids.py has the others by torch.export
    *((name, True) for name in ('levit', 'evolved', 'no class token', 'mixed rope')),
    *((name, False) for name in MODELS if name != 'mixed rope')])  # nor is timm's dense model with that one
def test_onnx(name, dynamo, tmp_path):
    model = reparameterize_model(create(name))
    some_images = functools.partial(images_for, model)
    path = tmp_path / 'model.onnx'
    if dynamo:
        torch.onnx.export(
            model, (some_images(2),), path, dynamo=True, verbose=False, external_data=False,
            input_names=['images'], dynamic_shapes=({0: torch.export.Dim('batch')},))
    else:  # what timm's onnx_export.py uses with PyTorch before 2.9
        torch.onnx.export(
            model, (some_images(2),), path, dynamo=False, input_names=['images'],
            dynamic_axes={'images': {0: 'batch'}})
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 2, 5):
        x = some_images(batch, seed=batch)
        logits, = session.run(None, {'images': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)
