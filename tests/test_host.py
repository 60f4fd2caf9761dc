"""On the device that there is: right logits, in every type and in threads, memory, nothing that makes the host wait."""
import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_evovit import evolve

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DEIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)
LEVIT = dict(img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(3, 1, 1))


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('dtype, precision', [
    (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)], ids=str)
@pytest.mark.parametrize('name, dense_name, kwargs', [
    ('evo_deit_small', 'deit_small_patch16_224', DEIT), ('evo_vit', 'vit_small_patch16_224', DEIT),
    ('evo_levit_256', None, LEVIT)])
def test_logits_on_the_device(name, dense_name, kwargs, dtype, precision, compiled):
    """Against those in float64 on the CPU and, at keep ratio 1, those of timm's dense model on the same device."""
    def difference(forward, expected):
        return (forward(x).double().cpu() - expected.double().cpu()).abs().max() / expected.abs().max().cpu()

    def forward(model):
        return torch.compile(model, fullgraph=True, backend='inductor' if DEVICE == 'cuda' else 'aot_eager')

    if compiled and DEVICE == 'cpu' and dtype != torch.float32:
        pytest.skip('on a CPU compiled code is compared in float32 only')
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    images = torch.randn(2, 3, kwargs['img_size'], kwargs['img_size'])
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        expected = copy.deepcopy(model).double()(images.double())
        model, x = model.to(DEVICE, dtype), images.to(DEVICE, dtype)
        assert difference(forward(model) if compiled else model, expected) < precision
        if dense_name:  # Evo-LeViT has a class token and no attention biases: no dense model equals it
            readout = {'global_pool': 'avg'} if name == 'evo_deit_small' else {}
            dense = timm.create_model(dense_name, **kwargs, **readout).eval().to(DEVICE, dtype)
            dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
            model.set_keep_ratio(1.)
            assert difference(forward(model) if compiled else model, dense(x)) < precision


class HostTensors(TorchDispatchMode):
    """Operators of a forward pass on another device that take or give a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.calls, self.found = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if any(isinstance(t, torch.Tensor) and t.device.type == 'cpu' for t in tree_leaves((args, kwargs, out))):
            self.found.append(str(func))
        return out


MODELS = {
    'deit': lambda: timm.create_model('evo_deit_tiny'),
    'deit, layer-wise': lambda: timm.create_model('evo_deit_tiny', selection='layer'),
    'deit, representative token': lambda: timm.create_model('evo_deit_tiny', representative_token=True),
    'levit': lambda: timm.create_model('evo_levit_128s'),
    'levit, layer-wise': lambda: timm.create_model('evo_levit_128s', selection='layer'),
    'evolved': lambda: evolve(timm.create_model('deit_tiny_patch16_224')),
}


@pytest.mark.parametrize('mode', ['inference', 'training', 'features'])
@pytest.mark.parametrize('name', MODELS)
def test_no_tensor_on_the_host(name, mode):
    model = MODELS[name]()
    model = model.to('meta').train(mode == 'training')  # on meta a value that the host asks for is an error
    x = torch.empty(2, 3, 224, 224, device='meta')
    with HostTensors() as tensors:
        if mode == 'features':
            model.forward_intermediates(x)
        elif mode == 'training':
            model(x).sum().backward()
        else:
            with torch.inference_mode():
                model(x)
    assert tensors.calls > 100 and not tensors.found


def test_a_tensor_on_the_host_is_found():
    with HostTensors() as tensors:
        torch.empty(2, device='meta') * torch.tensor(2.)
    assert 'aten.mul.Tensor' in tensors.found


@pytest.mark.parametrize('name', ['evo_vit', 'evo_deit_small', 'evo_levit_256'])
def test_threads_share_a_model(name):
    """As in a service: eight threads of Python call one model, and each gets what it would get alone."""
    torch.manual_seed(0)
    kwargs = LEVIT if 'levit' in name else DEIT
    model = timm.create_model(name, **kwargs).eval()
    batches = [torch.randn(1 + i % 3, 3, kwargs['img_size'], kwargs['img_size']) for i in range(64)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(torch.no_grad()(model), batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def peak_memory(model, x):
    """Bytes of tensors at most, during a forward pass on the CPU."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(x)
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    return max(accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))


@pytest.mark.parametrize('name', [
    'vit_tiny_patch16_224', 'eva02_tiny_patch14_224', 'vit_small_patch16_dinov3', 'naflexvit_base_patch16_gap'])
def test_less_memory_than_the_dense_model(name):
    """Only what restoration reads is kept until the end, not the slow tokens of each stage nor the complete sequence."""
    size = {} if 'naflex' in name else dict(img_size=96)
    dense = timm.create_model(name, patch_size=8, depth=12, embed_dim=96, num_heads=6, **size).eval()
    x = torch.randn(2, 3, 96, 96)
    assert peak_memory(evolve(dense), x) < peak_memory(dense, x)
