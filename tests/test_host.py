"""Nothing waits for the device or is copied to it in a forward pass, which CUDA graphs would not survive either."""
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_evovit import evolve


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
