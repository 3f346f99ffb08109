"tools/photographs.py, the trainings of page 60, at a tiny size"
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import photographs
import pytest
import torch
from PIL import Image
from plain import Plain
from sagan import training
from sagan.data import digits, load_images, to_unit
from sagan.references import train_evaluator
from sagan.runs import load_run
from sagan.visualization import grid_image

TINY = photographs.photos.change(g_width=2, d_width=4, batch=8)
PARTS = {'few': ({'10-augmented': ('all', 10, photographs.AUGMENT)}, 1, 32, 16),
         'one': ({'1-to-1': ('horse', 9, {})}, 1, 32, 16),
         'step': ({name: ('all', 40, dict(form='preprint')) for name in ('ours', 'theirs')}, 1, 32, 16)}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes of twenty pictures"
    at = tmp_path_factory.mktemp('pictures')
    for i, x in enumerate(digits().x[:40]):
        file = at/('horse', 'ship')[i % 2]/f'{i:02}.png'
        file.parent.mkdir(exist_ok=True)
        grid_image(to_unit(x[None]), 1).save(file)
    return at


@pytest.fixture
def stored(monkeypatch, tmp_path):
    "Everything is small, and the records go to a folder that is removed"
    monkeypatch.setattr(photographs, 'PARTS', PARTS)
    monkeypatch.setattr(photographs, 'photos', TINY)
    monkeypatch.setattr(photographs, 'SAMPLES', 20)
    monkeypatch.setattr(photographs, 'stored', tmp_path/'stored')
    with patch('sagan.measuring.train_evaluator', partial(train_evaluator, steps=20)): yield tmp_path/'stored'


def read(stored, part, row):
    return json.loads((stored/part/row/'seed0'/'records.json').read_text(encoding='utf-8'))


def test_few_images_are_as_many_of_each_class(folder):
    images = load_images(str(folder), 32)
    few = photographs.choose_images(images, 'all', 10)
    assert few.y.tolist() == [0]*5 + [1]*5
    assert (few.x[:5] == images.x[images.y == 0][:5]).all()


def test_one_kind_has_no_classes(folder):
    images = load_images(str(folder), 32)
    ships = photographs.choose_images(images, 'ship', 7)
    assert (ships.x == images.x[images.y == 1][:7]).all()
    assert ships.y.tolist() == [0]*7 and ships.classes == []


def test_copies_are_counted(folder, monkeypatch):
    "A generator that draws an image it was trained on, another one, and the first one again"
    images = load_images(str(folder), 32)
    trained = photographs.choose_images(images, 'all', 10)
    other = images[photographs.choose_rows(images, 'all', 40)[19:20]]
    x = torch.cat([*trained[:1].batches(), *other.batches(), *trained[:1].batches()])
    monkeypatch.setattr(photographs, 'generate_batches', lambda *_: [x[:2], x[2:]])
    found = photographs.count_near(None, images, 'all', 10, None, 3)
    assert (found['near'], found['samples'], found['by_chance']) == (2, 3, .75)
    # 2 and 1 hits among 40 images, of which 10 are drawn: the variance is 5*3/16 - 4*3/(16*39)
    assert abs(found['spread'] - .958) < .05


def test_a_row_leaves_records_and_pictures(folder, stored, tmp_path):
    photographs.train_row(folder, tmp_path/'runs', 'one', '1-to-1', 0)
    records = read(stored, 'one', '1-to-1')
    assert [r['step'] for r in records] == [2, 4]
    assert records[0]['reference'].startswith('20 images')  # all horses, though 9 were trained on
    for name in ('samples', 'attention'):
        assert min(Image.open(stored/'one'/'1-to-1'/'seed0'/f'{name}.png').size) >= 32


def test_a_part_starts_what_is_not_stored_to_the_end(folder, stored, tmp_path, monkeypatch):
    "A row with all of its records, with the first of two, and with none"
    started = []
    photographs.train_row(folder, tmp_path/'runs', 'few', '10-augmented', 0)
    monkeypatch.setattr(photographs.subprocess, 'run', lambda command, check: started.append(command[-3]))
    file = stored/'few'/'10-augmented'/'seed0'/'records.json'
    for n in (2, 1, 0):
        records = read(stored, 'few', '10-augmented')[:n]
        if n: file.write_text(json.dumps(records), encoding='utf-8')
        else: file.unlink()
        photographs.run_part(folder, tmp_path/'runs', 'few', 1)
        assert started == ['10-augmented']*(2 - n)


def test_few_images_are_compared_with_all(folder, stored, tmp_path):
    photographs.train_row(folder, tmp_path/'runs', 'few', '10-augmented', 0)
    run = load_run(tmp_path/'runs'/'few'/'10-augmented'/'seed0')
    assert run.cfg.diffaug == 'color,translation,cutout'
    assert read(stored, 'few', '10-augmented')[-1]['reference'].startswith('40 images')
    with patch.dict(PARTS['few'][0]['10-augmented'][2], lr_d=1e-3), pytest.raises(ValueError, match='other'):
        photographs.train_row(folder, tmp_path/'runs', 'few', '10-augmented', 0)
    near = json.loads((stored/'few'/'10-augmented'/'seed0'/'near.json').read_text(encoding='utf-8'))
    assert (near['samples'], near['by_chance']) == (1000, 250)


def test_the_plain_step_sees_what_ours_sees(folder, stored, tmp_path, monkeypatch):
    "The same images, labels and latents in the same order, from the same weights; both are measured alike"
    seen = dict(ours=[], theirs=[])
    d_step, g_step, step = training.d_step, training.g_step, Plain.step
    def spy_d(G, D, opt, *inputs):
        weights = [G.linear.parametrizations.weight.original, *inputs[:4]]
        seen['ours'].append([t.detach().clone() for t in weights])
        return d_step(G, D, opt, *inputs)
    def spy_g(G, D, opt, *inputs):
        seen['ours'][-1] += inputs[:2]
        return g_step(G, D, opt, *inputs)
    def spy(self, *inputs):
        seen['theirs'].append([t.detach().clone() for t in (self.G.linear.weight_orig, *inputs)])
        return step(self, *inputs)
    monkeypatch.setattr(training, 'd_step', spy_d)
    monkeypatch.setattr(training, 'g_step', spy_g)
    monkeypatch.setattr(Plain, 'step', spy)
    for row in ('ours', 'theirs'): photographs.train_row(folder, tmp_path/'runs', 'step', row, 0)
    assert len(seen['ours']) == len(seen['theirs']) == 4
    for i, (ours, theirs) in enumerate(zip(*seen.values())):
        for a, b in list(zip(ours, theirs))[i > 0:]: assert torch.equal(a, b)  # weights: the first step's
    for a, b in zip(read(stored, 'step', 'ours'), read(stored, 'step', 'theirs')):
        assert all(a[k] == b[k] for k in ('step', 'evaluator', 'reference'))


def test_the_averaged_plain_generator_is_ours():
    "Moved into our network, the average draws the same images"
    model = photographs.SAGAN(TINY.change(form='preprint'))
    theirs = Plain(model.cfg, model)
    z, y = torch.randn(8, 128), torch.arange(8)
    for _ in range(3): theirs.G(z, y)  # other averages and vectors than ours
    photographs.load_plain(model.ema, theirs.G, theirs.G)
    with torch.no_grad(): assert torch.allclose(model.ema(z, y), theirs.G.eval()(z, y), atol=1e-5)


def test_show_prints_the_last_fid(capsys):
    photographs.show()
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith('few     500-plain')]
    assert f"{read(photographs.stored, 'few', '500-plain')[-1]['fid']:.3f}" in line


def test_the_tool_explains_itself():
    tool = Path(photographs.__file__)
    done = subprocess.run([sys.executable, tool, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and '--row' in done.stdout
