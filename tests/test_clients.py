"""Other libraries and parts of timm that take models as they are: compilation, attention maps, OpenVINO."""
import pytest
import torch
from helpers import FEW_BLOCKS, MODELS, all_models, build, images_for
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

from timm_evovit import find_slow_tokens

# Compilation

@pytest.mark.slow
@all_models
def test_compiled(kind):
    """Gradients; compiled code follows a change of the keep ratio, also back to what it was."""
    torch._dynamo.reset()
    model = MODELS[kind](depth=FEW_BLOCKS.get(kind, 3))
    x = images_for(model.train())
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    gradients, outputs = [], []
    for m in (model, compiled):
        torch.manual_seed(0)  # the same heads
        gradients.append(torch.autograd.grad(m(x).square().mean(), list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        for keep_ratio in (0.5, 1, 0.5):
            compiled.set_keep_ratio(keep_ratio)
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], model(x))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


# Attention maps

@pytest.fixture
def unfused():
    """Attention that has a softmax to look at."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize('method', ['fx', 'hook'])
@torch.no_grad()
def test_attention_extract(method, unfused):
    """The map of the block before a selection holds the attention that the selection goes by."""
    dense, model = (build(name, depth=6, global_pool='token') for name in ('deit_tiny_patch16_224', 'evo_deit_tiny'))
    model.load_state_dict(dense.state_dict())
    x = images_for(model)
    first, second = find_slow_tokens(model, x)
    maps, dense_maps = [list(AttentionExtract(m, method=method)(x).values()) for m in (model, dense)]
    assert [tuple(m.shape) for m in maps] == [(3, 3, 17, 17)] * 2 + [(3, 3, 9, 9)] * 4
    torch.testing.assert_close(maps[:2], dense_maps[:2])
    torch.testing.assert_close(maps[1][:, :, 0, 1:].mean(dim=1), first.attention.flatten(1))
    assert first.block == 2 and second.block == 4


@pytest.mark.parametrize('kind, depth, method, tokens', [
    ('evolved', 6, 'fx', (15, 15, 10, 10, 7, 7)), ('evolved', 6, 'hook', (15, 15, 10, 10, 7, 7)),
    ('levit', (4, 2, 2), 'fx', (17, 17, 10, 10, 4, 4, 2, 2))])  # timm's LeViT has no module to hook
@torch.no_grad()
def test_attention_extract_of_slow_tokens(kind, depth, method, tokens, unfused):
    """With class and representative token, and with the sizes of groups in it."""
    model = MODELS[kind](depth=depth)
    maps = AttentionExtract(model, method=method)(images_for(model)).values()
    for m, n in zip(maps, tokens, strict=True):
        assert m.shape[2:] == (n, n)
        torch.testing.assert_close(m.sum(dim=3), torch.ones(m.shape[:3]))


# OpenVINO

@pytest.mark.slow
@all_models
def test_openvino(kind):
    openvino = pytest.importorskip('openvino', reason='openvino is not installed')
    model = MODELS[kind]()
    converted = openvino.convert_model(model, example_input=images_for(model, 2))
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch in (2, 1, 5):
        x = images_for(model, batch, seed=batch)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), expected, rtol=1e-3, atol=1e-3)
