"Exercises of pages 00 to 02 and 21: each check takes the folded solution and refuses three wrong answers"
import ast, json
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest, torch
from readme import directives

nbs = Path(__file__).resolve().parent.parent/'nbs'
kept = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef


@cache
def page(name):
    "What a page imports and defines before its exercises, and (solution, check) of each exercise"
    names, pairs = {}, []
    cells = json.loads((nbs/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    codes = [directives(''.join(c['source'])) for c in cells if c['cell_type'] == 'code']
    for (found, source), (_, check) in zip(codes, codes[1:]):
        if 'default_exp' in found: names |= vars(import_module(f'sagan.{found["default_exp"]}'))
        elif found.get('code-summary') == '"Solution"': pairs.append((source, check))
        elif not pairs and not found.keys() & {'export', 'exports', 'exporti'} and '%pip' not in source:
            tree = ast.parse(source)
            tree.body = [n for n in tree.body if isinstance(n, kept)]
            exec(compile(tree, name, 'exec'), names)
    return names, pairs


def answer(name, number, solution=None):
    "Run the check of an exercise on an answer, None for the folded one"
    names, pairs = page(name)
    folded, check = pairs[number - 1]
    scope = dict(names)
    exec(solution or folded, scope)
    exec(check, scope)


wrong = {
    ('00_start', 1): [
        'def attention_parameters(c): return 2*c*(c//8) + c*c',  # without gamma
        'def attention_parameters(c): return 3*c*(c//8) + 1',  # values as narrow as keys
        'def attention_parameters(c): return 2*c*(c//8) + 2*(c//8) + c*c + c + 1'],  # with biases
    ('00_start', 2): [
        'def blind_loss(s): return 2.',  # right at 0 only
        'def blind_loss(s): return (1 - s) + (1 + s)',  # no hinge
        'def blind_loss(s): return max(0, 1 - s)'],  # real images only
    ('00_start', 3): [
        'def uphill(D, points, lr): return points - lr*slope(D, points, "sum")',  # downhill
        'def uphill(D, points, lr): return points + lr*slope(D, points, "mean")',  # 1/n of the way
        'def uphill(D, points, lr): return points + lr*F.normalize(slope(D, points, "sum"))'],
    ('01_spectral', 1): [
        deflate := '''def two_largest(W, n=500):
    found = []
    for _ in range(2):
        u = torch.ones(len(W), dtype=W.dtype)
        for _ in range(n):
            v = F.normalize(W.T @ u, dim=0)
            u = F.normalize(W @ v, dim=0)
        found.append(u @ W @ v)
        W = W - torch.outer(u, v)
    return found''',  # sigma is missing
        deflate.replace('torch.outer(u, v)', '0'),  # the first one twice
        'def two_largest(W, n=500): return (torch.linalg.svdvals(W)[:2]**2)'],  # squares
    ('01_spectral', 2): [
        'def gain(k): return k*k',  # not normalized
        'def gain(k): return 1',  # the bound of a matrix
        'def gain(k): return k**.5'],
    ('01_spectral', 3): [
        'def norm_after(W, g, lr): return (W - lr*g).norm()',  # from vectors
        'def norm_after(w, g, lr): return w + lr*g',  # parallel
        'def norm_after(w, g, lr): return (w**2 + lr*g**2)**.5'],
    ('02_attention', 1): [
        attend := '''def attention(x, Wf, Wg, Wh, gamma):
    X = x.flatten(2)
    s = (Wf @ X).mT @ (Wg @ X)
    o = (Wh @ X) @ s.softmax(2)
    return (gamma*o + X).view_as(x)''',  # over the queries
        attend.replace('softmax(2)', 'softmax(1)').replace('Wf @ X).mT @ (Wg', 'Wg @ X).mT @ (Wf'),
        attend.replace('softmax(2)', 'softmax(1)').replace(' + X', '')],
    ('02_attention', 2): [
        'def merged(Wh, Wv): return Wh @ Wv',
        'def merged(Wh, Wv): return (Wv @ Wh).T',
        'def merged(Wh, Wv): return Wv + Wh.T'],
    ('02_attention', 3): [
        'def wrong(q, k, v): return (q @ k.mT).softmax(-1) @ v',  # the right axis
        'def wrong(q, k, v): return (k @ q.mT).softmax(-2) @ v',  # queries and keys exchanged
        'def wrong(q, k, v): return (q @ k.mT/2).softmax(-2) @ v',  # scaled
        'def wrong(q, k, v): return v.mean(1, keepdim=True).expand(-1, q.shape[1], -1)'],
    ('library/21_data', 1): [
        passes := '''def one_pass(images, bs, seed):
    n = len(images)
    order = (torch.arange(n) + 3 + seed) % n
    for i in order.split(bs):
        if len(i) == bs: yield images.x[i]/127.5 - 1, images.y[i]''',  # a rotation
        passes.replace('(torch.arange(n) + 3 + seed) % n', 'torch.randperm(n)'),  # without the seed
        passes.replace('(torch.arange(n) + 3 + seed) % n',
                       'torch.randint(n, (n,), generator=torch.Generator().manual_seed(seed))')]}
slope = '''def slope(D, points, how):
    points = points.clone().requires_grad_()
    return torch.autograd.grad(getattr(D(points), how)(), points)[0]
'''


@pytest.mark.parametrize('name, number', wrong)
def test_a_check_takes_the_solution_and_refuses_wrong_answers(name, number):
    answer(name, number)
    for text in wrong[name, number]:
        with pytest.raises((AssertionError, AttributeError, RuntimeError)): answer(name, number, slope + text)


def test_a_generator_s_loss_reaches_both_networks():
    "Its gradients go through the discriminator, too, whose optimizer discards them"
    names, _ = page('00_start')
    G, D, y = names['Generator'](), names['Discriminator'](), torch.arange(4)
    (-D(G(torch.randn(4, 128), y), y).mean()).backward()
    assert all(any(p.grad is not None for p in net.parameters()) for net in (G, D))
