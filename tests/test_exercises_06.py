"The exercises of page 06: each check accepts the page's solution and refuses wrong answers"
import json
from pathlib import Path

import pytest, torch
from readme import directives

page = Path(__file__).resolve().parent.parent/'nbs/06_training.ipynb'
cells = [directives(''.join(c['source'])) for c in json.loads(page.read_text(encoding='utf-8'))['cells']
         if c['cell_type'] == 'code']
sources = [source for _, source in cells]
at = [i for i, (names, _) in enumerate(cells) if names.get('code-summary') == '"Solution"']
solutions, checks = [[sources[i + n] for i in at] for n in (0, 1)]
IMPORTS = '''
import math, torch, torch.nn as nn
from fastcore.test import *
from sagan.config import presets
from sagan.data import digits, image_dls
from sagan.losses import d_hinge_loss, g_hinge_loss, ttur
from sagan.networks import Discriminator, Generator
from sagan.spectral import spectral_step
from sagan.training import ema_update, g_step
x, y = image_dls(digits(), 16).one_batch()
z = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
'''


@pytest.fixture(scope='module')
def names():
    "What the exercises use of the page"
    found = {}
    exec(IMPORTS, found)
    for start in ('def tiny_pair', 'def state('):
        exec(next(s for s in sources if s.startswith(start)).split('\n\n')[0], found)
    return found


def check(number, answer, names):
    found = dict(names)
    exec(answer, found)
    torch.manual_seed(0)
    exec(checks[number - 1], found)


@pytest.mark.parametrize('number', [1, 2, 3])
def test_solutions(number, names): check(number, solutions[number - 1], names)


WRONG_STEPS = {
    'no power iteration': ('    spectral_step(G)\n', ''),
    'raises the loss': ('loss = -D', 'loss = D'),
    'leaves gradients in D': ('requires_grad_(False)', 'requires_grad_(True)'),
    'leaves D frozen': ('requires_grad_(True)', 'requires_grad_(False)'),
    'takes no step': ('    opt.step()\n', ''),
    'moves the vectors of D': ('spectral_step(G)', 'spectral_step(G), spectral_step(D)')}


@pytest.mark.parametrize('old, new', WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_wrong_steps_of_the_generator(old, new, names):
    answer = solutions[0].replace(old, new)
    assert answer != solutions[0]
    with pytest.raises(AssertionError): check(1, answer, names)


@pytest.mark.parametrize('loss', [
    'g_hinge_loss(D(G(z, y), y))', 'd_hinge_loss(D(x, y), D(G(z, y), y))/2',
    '-d_hinge_loss(D(x, y), D(G(z, y), y))', 'd_hinge_loss(D(G(z, y), y), D(x, y))*0'])
def test_wrong_leaks(loss, names):
    answer = ('def leak(G, D, x, y, z):\n'
              f'    gradients = torch.autograd.grad({loss}, list(G.parameters()))\n'
              '    return torch.cat([g.flatten() for g in gradients])')
    with pytest.raises(AssertionError): check(2, answer, names)


@pytest.mark.parametrize('answer', ['1/(1 - decay)', '.5/(1 - decay)', 'math.log(decay)/math.log(.5)',
                                    '-math.log2(1 - decay)'])
def test_wrong_half_lives(answer, names):
    with pytest.raises(AssertionError): check(3, f'def half_life(decay): return {answer}', names)
