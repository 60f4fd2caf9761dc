"""Training steps of the distributed test, importable by the processes that it starts."""
import tempfile

import torch
from helpers import FAMILIES, FEW_BLOCKS, build, images, layerwise_phase
from timm import task
from torch import distributed, nn

from timm_evovit import AssistedLoss

STEPS = 3
PER_RANK = 4  # even, so that the joined batch alternates between the heads as each rank's does
SELECTIONS = {'stage': {}, 'layer': dict(selection='layer'), 'switch': dict(layer_to_stage_epochs=2)}
LOSSES = {'deit': ('alternating', 'exact'), 'levit': ('alternating', 'distilled')}
CASES = [(family, selection, loss) for family in LOSSES for selection in SELECTIONS for loss in LOSSES[family]]


class Teacher(nn.Module):
    """Says a class by the brightness of an image."""

    def forward(self, x):
        return torch.nn.functional.one_hot(x.mean(dim=(1, 2, 3)).mul(1000).long() % 10, 10).float()


def make_task(family, selection, loss):
    """Model and task, under whose care each version of timm gives the model another name."""
    model = build(FAMILIES[family], depth=FEW_BLOCKS[family], **SELECTIONS[selection])
    if loss == 'distilled':
        return model, task.TokenDistillationTask(
            model, Teacher(), nn.CrossEntropyLoss(), distill_type='hard', task_loss_weight=0.5, verbose=False)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    if loss == 'exact':
        model.set_assisted_training()
        criterion = AssistedLoss(criterion)
    return model, task.ClassificationTask(model, criterion, verbose=False)


def batch(family, step, rank):
    x = images(PER_RANK, 64 if family == 'levit' else 32, seed=100 * step + rank)
    return x, torch.arange(PER_RANK) + step + rank


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train_rank(rank, folder):
    """One of two processes: every case, an epoch per step."""
    torch.set_num_threads(1)
    torch.randperm = torch.arange  # the heads answer every second sample, as they do in the joined batch
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    for case in CASES:
        model, training = make_task(*case)
        training.prepare_distributed()  # unused parameters are an error in the second step
        optimizer = make_optimizer(model)
        phases = []
        for step in range(STEPS):
            training.train()
            training(*batch(case[0], step, rank))['loss'].backward()
            phases.append(layerwise_phase(model))
            optimizer.step()
            optimizer.zero_grad()
        torch.save((model.state_dict(), phases), f'{folder}/{"-".join(case)}-{rank}.pt')
    distributed.destroy_process_group()


def call_on_rank(rank, function, folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.save(function(rank), f'{folder}/{rank}.pt')
    distributed.destroy_process_group()


def in_two_processes(function):
    """What a function of the rank returns on each of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(call_on_rank, (function, folder), nprocs=2)
        return [torch.load(f'{folder}/{rank}.pt') for rank in range(2)]
