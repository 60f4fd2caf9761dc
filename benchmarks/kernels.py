#!/usr/bin/env python3
"""Kernels that PyTorch's compiler emits for a GPU, dense and evolving, counted without a GPU.

    python benchmarks/kernels.py --output benchmarks/results/kernels.json

A model in bfloat16 is exported on fake CUDA tensors and lowered by Inductor for an H100. The calls in the program that
Inductor writes are counted; nothing is run. Batch norms of LeViT are folded. What only a GPU can tell is assumed: fused
attention is one kernel, flash attention, or memory-efficient attention where there is a bias; no matrix product is
padded. An operator that Inductor leaves to PyTorch, such as topk, counts as one, although it may launch several.

Needs triton. It takes the place of internals of PyTorch and is written for PyTorch 2.14.
"""
import argparse
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional
from unittest import mock

import gpu
import harness
import torch
from timm.utils import reparameterize_model
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

PAIRS = (gpu.DEIT_S, gpu.EVOLVED, gpu.LEVIT)
H100 = SimpleNamespace(
    name='NVIDIA H100 80GB HBM3', major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, total_memory=80 * 2 ** 30)
CALL = re.compile(r'\b(?:(triton)_(\w+?)_\w+\.run|extern_kernels\.(\w+)|torch\.ops\.(\w+\.\w+)[.\w]*)\(')
KINDS = {
    'addmm': 'matmul', 'mm': 'matmul', 'bmm': 'matmul', 'baddbmm': 'matmul', 'convolution': 'convolution',
    'aten._scaled_dot_product_flash_attention': 'attention',
    'aten._scaled_dot_product_efficient_attention': 'attention',
    'poi': 'pointwise', 'per': 'reduction', 'red': 'reduction'}


def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        dropout_p: float = 0.,
        is_causal: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention as it is on a GPU: without one it does not choose a fused kernel."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    n = k.shape[2]
    if any(stride % 8 for stride in attn_mask.stride()[:-1]):  # PyTorch's rule: rows of a bias must be aligned
        attn_mask = F.pad(attn_mask, [0, 8 - n % 8])[..., :n]
    attn_mask = attn_mask.expand(-1, q.shape[1], q.shape[2], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False, dropout_p, is_causal)[0]


def lower(model: torch.nn.Module, batch_size: int, size: List[int]) -> str:
    """The program that Inductor writes for a forward pass. The model is left with fake parameters."""
    def patch(target: Any, **values: Any) -> None:
        stack.enter_context(mock.patch.multiple(target, **values))

    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        model.to_empty(device='cuda')
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        x = torch.empty(batch_size, *size, dtype=next(model.parameters()).dtype, device='cuda')
        patch(F, scaled_dot_product_attention=attention)
        graph = torch.export.export(model, (x,), strict=False).module(check_guards=False)

        # both would run kernels; the first leaves the kernels as they are
        stack.enter_context(config.patch(joint_graph_constant_folding=False, shape_padding=False))
        here = dict(get_device_properties=lambda *_: H100, current_device=lambda: 0)
        patch(torch.cuda, **here, get_device_capability=lambda *_: (H100.major, H100.minor))
        patch(CudaInterface, **{k: staticmethod(f) for k, f in {
            **here, 'is_available': lambda: True, 'is_bf16_supported': lambda *_, **__: True,
            'raise_if_triton_unavailable': lambda *_: None}.items()})
        patch(CudaInterface.Worker, get_device_properties=staticmethod(here['get_device_properties']))
        patch(torch.utils._triton, triton_hash_with_backend=lambda *_: '')
        assert mode.avoid_device_init
        return get_code(lambda: compile_fx(graph, [x])(x))[0]


def count(code: str) -> Dict[str, Any]:
    """Calls by kind, those of kind 'other' by name as well, and all of them."""
    kinds, others = Counter({kind: 0 for kind in [*KINDS.values(), 'other']}), Counter()
    for match in CALL.finditer(code[code.index('def call('):]):
        name = match[2] or match[3] or match[4]
        kinds[KINDS.get(name, 'other')] += 1
        if name not in KINDS:
            others[name] += 1
    return {**kinds, 'kernels': kinds.total(), 'others': dict(others)}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-b', '--batch-sizes', type=int, nargs='+', default=[1, 256])
    parser.add_argument('--tiny', action='store_true', help='tiny models, to test this program')
    parser.add_argument('--code', type=Path, metavar='DIR', help='folder for the programs of Inductor, to read them')
    parser.add_argument('--output', type=Path, metavar='JSON', help='result file')
    args = parser.parse_args(argv)
    report = harness.Report('kernels', args.output, argv=['-b', *map(str, args.batch_sizes)])
    for run, (names, batch_size) in enumerate((names, b) for b in args.batch_sizes for names in PAIRS):
        for name in names:
            kwargs = gpu.MODEL_KWARGS.get(name, {})
            tiny = gpu.tiny_kwargs(name) if args.tiny else {}
            model = harness.create_model(name, **kwargs, **tiny).eval()
            size = harness.input_size(model, tiny.get('img_size'))
            if 'levit' in name:
                model = reparameterize_model(model)
            code = lower(model.bfloat16(), batch_size, size)
            if args.code:
                args.code.mkdir(parents=True, exist_ok=True)
                (args.code / f'{name}_{batch_size}.py').write_text(code)
            row = dict(run=run, model=name, baseline=names[0], model_kwargs=kwargs, batch_size=batch_size)
            row.update(count(code))
            report.add(row)
            print(row, flush=True)


if __name__ == '__main__':
    main()
