"""Matching and grouping of tokens, against plain references."""
from itertools import product

import pytest
import reference
import torch
from torch.nn import functional as F

from timm_evovit.similarity import TokenGroups, checkerboard, group_tokens, match_tokens, run_blocks
from timm_evovit.tokens import as_fraction


def groups(tokens, count):
    """The group of each token, by one round of matching to `count` groups."""
    n = tokens.shape[1]
    return group_tokens(tokens, torch.ones(len(tokens), n), torch.zeros(len(tokens), n), 0, n, (count, n))[3].slow_idx


def reference_groups(tokens, count):
    found = reference.match(list(tokens), count).groups
    return [next(i for i, group in enumerate(found) if j in group) for j in range(len(tokens))]


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ties_are_resolved_by_position():
    """Of equal patches the first even ones join the first odd one, whatever the other images are."""
    tokens = torch.cat([torch.ones(2, 8, 4), random_tokens(3, 8, 4)])
    assert groups(tokens, 6)[:2].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]] * 2
    assert torch.equal(groups(tokens[3:4], 5)[0], groups(tokens, 5)[3])


def test_large_tokens_in_half_precision():
    """Their dot products, a million here, are more than half precision holds."""
    tokens = torch.eye(32)[[0, 0, 1, 2, 3, 0]].unsqueeze(0)
    tokens[0, 1, 4] = 1  # the first token is less like this one than like the last one
    for x in (tokens, 1000 * tokens.half()):
        assert groups(x, 5).tolist() == [[4, 0, 1, 2, 3, 4]]


def test_a_zero_token_in_half_precision_is_like_no_other():
    tokens = random_tokens(1, 64, 32)
    tokens[:, 3] = 0
    for x in (tokens, tokens.half()):
        assert groups(x, 54).unique().numel() == 54


@pytest.mark.parametrize('autocast', [False, True])
def test_pairs_of_bfloat16_tokens_are_those_of_float64(autocast):
    """Patches that differ little, as those of a real picture: scores in bfloat16 would find other pairs."""
    tokens = (random_tokens(1, 1, 48) + 0.05 * random_tokens(2, 64, 48, seed=1)).bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        found = groups(tokens, 40)
    assert found.tolist() == [reference_groups(image, 40) for image in tokens.double()]
    length = tokens.norm(dim=-1, keepdim=True)
    scores = (tokens[:, ::2] / length[:, ::2]) @ (tokens[:, 1::2] / length[:, 1::2]).mT
    _, partner = match_tokens(*(tokens[:, i::2].float() for i in (0, 1)), *torch.ones(2, 2, 32), False)
    assert (scores.argmax(dim=2) == partner).float().mean() < 0.9  # the test can fail


@pytest.mark.parametrize('n, width', [(1, 1), (2, 1), (3, 3), (9, 1), (9, 3), (12, 4), (16, 4), (10, 5)])
def test_groups_and_means_are_those_of_the_reference(n, width):
    """Of tokens as they are in the first round, of a checkerboard, and of groups of several patches."""
    x, weight = random_tokens(3, 2 + n, 8).double(), random_tokens(8, seed=1).double()
    patches = torch.randint(1, 9, (n,), generator=torch.Generator().manual_seed(2)).tolist()
    for own, count in product(([1] * n, patches), range(max(1, n // 2), n + 1)):
        before = torch.tensor([1, 1, *own]).double().expand(3, -1)
        *slow_tokens, grouping = group_tokens(
            x, before, before / 8, 2, sum(own), (count, sum(own)), channel_weight=weight, width=width)
        for image, slow_idx, slow, size, spread in zip(x, grouping.slow_idx, *slow_tokens):
            groups, means, costs = reference.match(list(image[2:]), count, own, weight, width)
            members = [[0], [1]] + [[2 + j for j in group] for group in groups]
            assert [sorted(group) for group in members] == [
                (slow_idx == g).nonzero().flatten().tolist() for g in range(2 + count)]
            torch.testing.assert_close(slow, torch.stack([*image[:2], *means]))
            assert size.tolist() == [1, 1] + [sum(own[j] for j in group) for group in groups]
            torch.testing.assert_close(spread - size / 8, spread.new_tensor([0, 0, *costs]))


def test_a_checkerboard_has_every_patch_once():
    """Also where patch dropout leaves an odd number of a grid with an even width."""
    for n, width in product(range(1, 12), range(1, 6)):
        assert sorted(checkerboard(torch.arange(n), width).tolist()) == list(range(n))


def test_large_groups_in_bfloat16(monkeypatch):
    """A group of five hundred patches that differ little: its mean is not that of the last few."""
    index_add_, seen = torch.Tensor.index_add_, []

    def recorded(base, *args):
        seen.append(base.dtype)
        return index_add_(base, *args)

    monkeypatch.setattr(torch.Tensor, 'index_add_', recorded)
    tokens = 1 + torch.arange(1000.).view(1, 1000, 1) / 1000
    tokens = F.pad(tokens, [0, 1])
    tokens[:, 3::2] = tokens[:, 3::2].flip(2)  # all even ones are like the first odd one, and like no other
    ones = torch.ones(1, 1000)
    slow, sizes, _, _ = group_tokens(tokens.bfloat16(), ones, 0 * ones, 0, 1000, (1, 2))
    mean = torch.cat([tokens[:, ::2, :1], tokens[:, 1:2, :1]], dim=1).mean()
    assert sizes[0, 0] == 501 and seen == [torch.float32]
    assert slow.dtype == torch.bfloat16 and abs(slow[0, 0, 0].item() - mean.item()) < 0.01


def test_keys_weigh_their_patches_times_the_squared_length_of_a_mean_of_unit_vectors():
    """To first order in the distances of tokens, where one token is joined to one other."""
    x = random_tokens(1, 1, 48) + 0.2 * random_tokens(2, 64, 48, seed=1)
    groups = TokenGroups(x, 0, grid_size=(8, 8))
    mask = groups.attn_mask(groups.join(x, (3, 4), None))[:, 0, 0]
    for units, number, weights in zip(F.normalize(x, dim=2), groups.slow_tokens(0).groups, mask.exp()):
        pairs = (number.bincount() == 2).nonzero().flatten()
        means = torch.stack([units[number == i].mean(dim=0) for i in pairs])
        torch.testing.assert_close(weights[pairs], 2 * means.norm(dim=1) ** 2, rtol=1e-3, atol=0)
        assert len(pairs) >= 3 and weights[pairs].max() < 1.99  # the test can fail


@pytest.mark.parametrize('valid', [1, 2, 5, 8, 9])
def test_padding_leaves_the_groups_of_the_others(valid):
    """It joins no patch, weighs nothing, and is one group, the last."""
    n = 9
    x, sizes = random_tokens(1, n, 6), torch.ones(1, n)
    sizes[..., valid:] = 0
    slow, slow_sizes, spread, grouping = group_tokens(x, sizes, 0 * sizes, 0, n, (1, 2), torch.tensor([[valid]]))
    alone, alone_sizes, alone_spread, alone_grouping = group_tokens(
        x[:, :valid], sizes[:, :valid], 0 * sizes[:, :valid], 0, valid, (1, 2))
    count = alone.shape[1]
    assert torch.equal(grouping.slow_idx[:, :valid], alone_grouping.slow_idx)
    torch.testing.assert_close(slow[:, :count], alone)
    assert torch.equal(slow_sizes[:, :count], alone_sizes) and not slow_sizes[:, count:].any()
    assert torch.equal(spread[:, :count], alone_spread) and not spread[:, count:].any()
    assert (grouping.slow_idx[:, valid:] == slow.shape[1] - 1).all()


@pytest.mark.parametrize('ratio', [1e-13, 1e-9, 1 / 3])
def test_any_ratio_leaves_one_token_at_least(ratio):
    class Block(torch.nn.Module):
        def forward(self, x, attn_mask):
            seen.append(x.shape[1])
            return x + 1

    seen, x = [], random_tokens(2, 10, 4)
    out, _ = run_blocks([Block()], [x], {0: as_fraction(ratio)}, 1)
    assert seen == [1 + max(1, int(9 * ratio))]
    torch.testing.assert_close(out, x + 1)  # every patch gets what its slow token got
