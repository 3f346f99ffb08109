"Exercises of pages 08 to 10, 62 and 40: each check takes the folded solution and refuses three wrong answers"
from copy import deepcopy
from functools import cache

import pytest, torch
from sagan.data import to_unit, twins
from sagan.experiments import load_experiment
from sagan.outcomes import table
from sagan.runs import load_run, shipped
from test_exercises_00 import nbs, page

@cache
def given(name):
    "What the checks of a page take from its other cells"
    if name == '10_experiments':
        done = {k: load_experiment(nbs/'experiments'/k) for k in ('table1-twins', 'figure3-digits', 'claim')}
        observed = {v.name: [s[-1]['agreement'] for s in seeds] for v, seeds in done['table1-twins']}
        variants = done['figure3-digits']
        return dict(done=done, observed=observed,
                    rows3={v.name: row for (v, _), row in zip(variants, table(variants))})
    runs = {k: load_run(shipped(k)) for k in ('digits', 'twins')}
    z = torch.randn(60, 128, generator=torch.Generator().manual_seed(0))
    if name == '08_visualization': return dict(runs=runs, G=runs['digits'].model.ema, z=z)
    if name != '09_explorer': return {}
    names, _ = page(name)
    model, classes = runs['twins'].model, runs['twins'].classes
    _, maps = names['generated_maps'](model, z[:3], torch.arange(3))
    return dict(model=model, classes=classes, maps=maps, m=maps['G 16x16'], real=twins(4), to_unit=to_unit)


def answer(name, number, solution=None):
    "Run the check of an exercise on an answer, None for the folded one"
    names, pairs = page(name)
    folded, check = pairs[number - 1]
    scope = dict(names) | deepcopy(given(name))  # an answer may leave a network changed
    exec(solution or folded, scope)
    exec(check, scope)


change = """@torch.no_grad()
def change(G, z, y, factor):
    before, gamma = G(z, y), G.attention['16'].gamma
    kept = gamma.clone()
    gamma.mul_(factor)
    after = G(z, y)
    gamma.copy_(kept)
    return (after - before).abs().mean().item()"""
windows = """def predicted(blocks):
    width, step = 1, 1
    for block in range(blocks):
        width += 2*2*step
        if block < 2: width, step = width + step, 2*step
    return min(width, 32)"""
loss = """def loss(u, v):
    real = (1 - (u + v)).clamp(min=0).mean()
    changed = (1 + u[:, None] + v[None]).clamp(min=0)
    n = len(u)
    return real + (changed.sum() - changed.diagonal().sum())/(n*(n - 1))"""
wrong = {
    ('08_visualization', 1): [
        'def times_even(m): return m.max().item()',  # the weight itself
        'def times_even(m): return (m.max()*len(m)).item()',  # one side of the map only
        'def times_even(m): return (m.max()/m.min()).item()'],
    ('08_visualization', 2): [
        'def looked_at(beta): return beta.amax(1)*beta.shape[2]',  # by one query, not by all
        'def looked_at(beta): return beta.sum(1)',  # not beside an even spread
        'def looked_at(beta): return beta.mean(1)*beta.shape[1]'],  # as many as queries
    ('08_visualization', 3): [
        change.replace('    gamma.copy_(kept)\n', ''),  # gamma stays
        change.replace('gamma.mul_(factor)', 'gamma.fill_(factor)'),
        change.replace('.abs()', '.square()')],
    ('09_explorer', 1): [
        'def straight_length(t): return (1 - t) + t',  # lengths do not add
        'def straight_length(t): return (1 - t)**2 + t**2',  # the variance
        'def straight_length(t): return 1 - t + t**2'],
    ('09_explorer', 2): [
        'def view_size(images, size, layers): return images*3*size**2 + 768',  # images alone
        sized := """def view_size(images, size, layers):
    vectors = sum(depth*(queries**2 + keys**2) for queries, keys, depth in layers)
    return images*(3*size**2 + vectors) + 256*3""",  # a byte for each number
        sized.replace('depth*', '2*depth*').replace('+ 256*3', '').replace('+ vectors)', '+ vectors + 768)')],
    ('09_explorer', 3): [
        'def in_script(state): return json.dumps(state)',  # the name becomes a tag
        r'def in_script(state): return json.dumps(state).replace("</", "<\\/")',  # <!--<script> is left
        'def in_script(state): return json.dumps(state).replace("<", "")'],  # not read back
    ('10_experiments', 1): [
        'def flattery(seeds): return mean(min(r["fid"] for r in s) - s[-1]["fid"] for s in seeds)',
        'def flattery(seeds): return mean(s[0]["fid"] - min(r["fid"] for r in s) for s in seeds)',
        """def flattery(seeds):
    means = [mean(r['fid'] for r in at) for at in zip(*seeds)]
    return means[-1] - min(means)"""],  # the best of the mean curve
    ('10_experiments', 2): [
        chance := """def chance(ours, others):
    picked = [mean(p) for p in product(*zip(ours, *others))]
    return mean(p > mean(ours) + 1e-12 for p in picked)""",  # our own choice is left out
        chance.replace('zip(ours, *others)', 'zip(*others)'),
        """from itertools import combinations
def chance(ours, others):
    values = [*ours, *(v for o in others for v in o)]
    picked = [mean(p) for p in combinations(values, len(ours))]
    return mean(p >= mean(ours) - 1e-12 for p in picked)"""],  # exchanged between seeds, too
    ('10_experiments', 3): [
        'def fools(n): return torch.zeros(n, 2, 2, dtype=torch.int64)',  # one image: kappa is 0
        'def fools(n): return (torch.arange(n) % 3)[:, None, None].expand(n, 2, 2)',  # three
        'def fools(n): return (torch.arange(n) % 2)[:, None].expand(n, 2)'],  # one twin
    ('library/62_statistics', 1): [
        'def mean_distance(n): return .5214',  # of very large n
        mean_distance := """def mean_distance(n):
    at = torch.tensor([(i/n, j/n) for i in range(n) for j in range(n)])
    return torch.pdist(at).mean().item()""",  # without a cell and itself
        mean_distance.replace('torch.pdist(at)', '(at[:, None] - at).abs().sum(-1)')],  # around corners
    ('library/62_statistics', 2): [
        'def spearman(a, b): return torch.corrcoef(torch.stack([a, b]))[0, 1].item()',  # no ranks
        spearman := """def spearman(a, b):
    def rank(t): return t.argsort().argsort().float()
    return torch.corrcoef(torch.stack([rank(a), rank(b)]))[0, 1].item()""",  # equal values in some order
        spearman.replace('.argsort().argsort()', '.argsort()')],
    ('library/40_claim', 1): [
        'def predicted(blocks): return {1: 5, 2: 13, 4: 32}[blocks]',  # without pooling
        windows.replace('2*2*step', '2*step'),  # one convolution
        windows.replace('min(width, 32)', 'width')],  # more than the image
    ('library/40_claim', 2): [
        loss.replace(' - changed.diagonal().sum())/(n*(n - 1))', ')/n**2'),  # real ones, too
        loss.replace('.clamp(min=0)', ''),  # no hinge
        loss.replace('real + ', '')]}


@pytest.mark.parametrize('name', dict.fromkeys(name for name, _ in wrong))
def test_folded_solutions_pass(name):
    _, pairs = page(name)
    assert [n for _, n in wrong if _ == name] == [*range(1, len(pairs) + 1)]
    for number in range(1, len(pairs) + 1): answer(name, number)


@pytest.mark.parametrize('name, number', wrong, ids=[f'{n}.{k}' for n, k in wrong])
def test_wrong_answers_are_refused(name, number):
    "Three wrong answers, each of which runs"
    assert len(wrong[name, number]) == 3
    for solution in wrong[name, number]:
        with pytest.raises(AssertionError): answer(name, number, solution)
