"""Compiled with any batch size, and exported to ONNX: the same outputs from the same informative tokens."""
import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import TINY, TINY_LEVIT, images_for, informative_indices, randomize
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounter

from timm_evovit import evolve, informative_tokens

SMALL = dict(TINY, depth=3)
LEVIT = dict(TINY_LEVIT, img_size=96, key_dim=8, depth=(3, 1, 1))
MODELS = {
    'deit': lambda: timm.create_model('evo_deit_tiny', **SMALL),
    'deit, layer-wise, representative token': lambda: timm.create_model(
        'evo_deit_tiny', selection='layer', representative_token=True, **SMALL),
    'levit': lambda: timm.create_model('evo_levit_128s', **LEVIT),
    'evolved': lambda: evolve(timm.create_model('vit_small_patch14_reg4_dinov2', init_values=0.5, **SMALL)),
}


def build(name):
    torch.manual_seed(0)
    return randomize(MODELS[name]()).eval()


def with_selections(path):
    """The model with the indices of the informative tokens as further outputs: each selection is one TopK."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == 'TopK':
            model.graph.output.append(onnx.ValueInfoProto(name=node.output[1]))
    return model.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('name', MODELS)
def test_one_graph_for_every_batch_size(name, training):
    torch._dynamo.reset()
    model = build(name).train(training)
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


@pytest.mark.slow
@pytest.mark.parametrize('dynamo', [True, False], ids=['torch.export', 'TorchScript'])
@pytest.mark.parametrize('name', MODELS)
def test_onnx(name, dynamo, tmp_path):
    model = reparameterize_model(build(name))
    path = tmp_path / 'model.onnx'
    if dynamo:
        torch.onnx.export(
            model, (images_for(model, 2),), path, dynamo=True, verbose=False, external_data=False,
            input_names=['images'], output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch')},))
    else:  # what timm's onnx_export.py uses with PyTorch before 2.9
        torch.onnx.export(
            model, (images_for(model, 2),), path, dynamo=False, input_names=['images'], output_names=['logits'],
            dynamic_axes={'images': {0: 'batch'}, 'logits': {0: 'batch'}})
    session = onnxruntime.InferenceSession(with_selections(path))
    for batch in (1, 2, 5):
        x = images_for(model, batch, seed=batch)
        logits, *kept = session.run(None, {'images': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)
        found = informative_tokens(model, x)
        assert len(kept) == len(found) >= 2
        for indices, t in zip(kept, found):
            assert [sorted(row) for row in indices.tolist()] == informative_indices(t)
