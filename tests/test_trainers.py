"""The layer-to-stage schedule under trainers other than timm's train.py."""
import copy

import pytest
import timm
import torch
from helpers import FEW_BLOCKS, TINY, both_families, build, images_for, layerwise_phase
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from timm_evovit import evolve

EPOCHS, LAYERWISE = 4, 2


@both_families
def test_the_phase_follows_from_the_state(family):
    """Flags that are set by hand, module by module, as Lightning does after validation, have the effect of train()."""
    model = build(family, layer_to_stage_epochs=3)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    x = images_for(model, 4)

    def logits():
        torch.manual_seed(0)  # the same heads
        return model(x)

    expected = logits()
    model.eval()
    assert not layerwise_phase(model)
    for name, module in model.named_modules():
        module.training = modes[name]
    assert layerwise_phase(model) and model.epochs_started == 1
    torch.testing.assert_close(logits(), expected)
    model.set_epoch(3)
    assert not layerwise_phase(model) and not torch.allclose(logits(), expected)
    model.set_epoch(0)
    torch.testing.assert_close(logits(), expected)


@pytest.mark.slow
@both_families
def test_compiled_once_for_each_phase(family):
    """No graph break, and no compilation but at the change from one phase to the other."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = build(family, layer_to_stage_epochs=2, depth=FEW_BLOCKS[family])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = images_for(model, 4)
    counts = []
    for epoch in range(4):
        for _ in range(3):
            model.train()  # as transformers' Trainer does in each step
            model.set_epoch(epoch)
            compiled(x)
        counts.append(len(graphs))
        model.eval()
        with torch.no_grad():
            compiled(x)
            compiled(x)
    assert counts == [1, 2, 3, 3]  # layer-wise; evaluation; stage-wise


def dataset(n=8):
    return TensorDataset(torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 10)


def small_model():
    return timm.create_model('evo_deit_tiny', **TINY, depth=6, layer_to_stage_epochs=LAYERWISE)


@pytest.mark.slow
@pytest.mark.parametrize('validation', [False, True])
def test_lightning(tmp_path, validation):
    lightning = pytest.importorskip('lightning', reason='lightning is not installed')
    phases = []

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def training_step(self, batch, index):
            phases.append((self.current_epoch, layerwise_phase(self.model)))
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, index):
            assert not layerwise_phase(self.model)
            self.model(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class SetEpoch(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            module.model.set_epoch(trainer.current_epoch)

    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[SetEpoch()])
    trainer.fit(module, DataLoader(dataset(), 4), DataLoader(dataset(), 4) if validation else None)
    assert phases == [(epoch, epoch < LAYERWISE) for epoch in range(EPOCHS) for _ in range(2)]
    assert module.model.epochs_started == EPOCHS


@pytest.mark.slow
def test_transformers(tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    phases = []

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def forward(self, pixel_values, labels=None):
            logits = self.model(pixel_values)
            if self.training:
                phases.append(layerwise_phase(self.model))
            return dict(loss=F.cross_entropy(logits, labels), logits=logits)

    class SetEpoch(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            model.model.set_epoch(round(state.epoch))

    module = Classifier()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=EPOCHS, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy='no', eval_strategy='epoch', disable_tqdm=True, logging_strategy='no', remove_unused_columns=False)
    data = [dict(pixel_values=x, labels=y) for x, y in dataset()]
    trainer = transformers.Trainer(module, args, train_dataset=data, eval_dataset=data, callbacks=[SetEpoch()])
    trainer.train()
    assert phases == [epoch < LAYERWISE for epoch in range(EPOCHS) for _ in range(2)]


@pytest.mark.slow
def test_accelerate():
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    accelerator = accelerate.Accelerator(cpu=True)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset(), 4))
    phases = []
    for epoch in range(EPOCHS):
        accelerator.unwrap_model(prepared).set_epoch(epoch)
        for x, y in loader:
            prepared.train()
            phases.append(layerwise_phase(model))
            accelerator.backward(F.cross_entropy(prepared(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert phases == [epoch < LAYERWISE for epoch in range(EPOCHS) for _ in range(2)]


@torch.no_grad()
def test_weights_offloaded_by_accelerate():
    """Before `evolve` in both views, and afterwards in the one that is offloaded. Groups are those of the weights."""
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    torch.manual_seed(0)
    dense = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=4, depth=4).eval()
    for block in dense.blocks:
        block.norm1.weight.normal_()
    x = images_for(dense)
    expected, evolved = dense(x), evolve(dense, 0.5)(x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(dense))
    view = evolve(offloaded, 0.5)
    for model in (view, copy.deepcopy(view), evolve(offloaded, 0.5)):
        torch.testing.assert_close(model(x), evolved)
    assert torch.equal(offloaded(x), expected) and next(view.parameters()).is_meta
    whole_blocks = accelerate.cpu_offload(copy.deepcopy(dense), torch.device('cpu'), preload_module_classes=['Block'])
    torch.testing.assert_close(evolve(whole_blocks, 0.5)(x), evolved)
    accelerate.hooks.remove_hook_from_module(offloaded, recurse=True)
    for model in (evolve(offloaded, 0.5), accelerate.cpu_offload(evolve(copy.deepcopy(dense), 0.5))):
        torch.testing.assert_close(model(x), evolved)
    offloaded.forward = accelerate.cpu_offload  # of somebody else, with hooks of accelerate around it
    with pytest.raises(TypeError, match='attribute forward of the model replaces a method'):
        evolve(accelerate.cpu_offload(offloaded), 0.5)
