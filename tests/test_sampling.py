"Sampling: what the page does not show; the same image in every kind of output, and truncation measured"
import io, zipfile
from collections import Counter
from functools import partial
from unittest.mock import patch

import numpy as np, pytest, torch
from PIL import Image
from scipy.stats import kstest, truncnorm
from fastcore.docments import docments
from sagan import cli, sampling
from sagan.checkpoints import Run
from sagan.config import preset
from sagan.data import digits, load_images, to_bytes, to_unit
from sagan.networks import generate
from sagan.references import train_evaluator
from sagan.reports import seeded_latents
from sagan.runs import load_run
from sagan.sampling import (
    class_folders, describe_samples, draw_batches, draw_eights, draw_rows, nearest_run, sample_run, truncate,
    truncated_generator)
from sagan.training import SAGAN
from test_names import NAMES
from torch_fidelity.utils import glob_samples_paths
from torchvision.datasets import ImageFolder


def made(tmp_path, n_classes=0, **config):
    "A run whose networks are not trained"
    torch.manual_seed(0)
    cfg = preset('tiny').change(g_width=2, d_width=4, z_dim=8, n_classes=n_classes, **config)
    return Run(tmp_path, SAGAN(cfg).eval(), cfg, [f'c{i}' for i in range(n_classes)], 0, [])


def pixels(file): return np.asarray(Image.open(file))


def test_the_same_image_everywhere(tmp_path):
    "In a folder, an archive and a picture, whatever else is drawn; and up to rounding by `generate`"
    r = load_run('digits')
    few = sample_run(r, 3, ['7', 2], seed=5, out=tmp_path/'few')
    assert [f.name for f in sorted((few/'2').iterdir())] == [f'seed5-{i:06}.png' for i in range(3)]
    with np.load(sample_run(r, 9, [2], seed=5, out=tmp_path/'many.NPZ')) as a: x, y = a['arr_0'], a['arr_1']
    picture = pixels(sample_run(r, 2, [2, 7], seed=5, out=str(tmp_path/'picture.png')))
    picture = picture[:, -70:]  # without names
    assert x.shape == (9, 32, 32, 3) and x.dtype == np.uint8 and y.dtype == np.int64 and (y == 2).all()
    for i in range(3): assert (pixels(few/f'2/seed5-{i:06}.png') == x[i]).all()
    assert (picture[2:34, 36:68] == x[1]).all()
    assert (picture[36:68, 2:34] == pixels(few/'7/seed5-000000.png')).all()
    close = to_bytes(generate(r.model.ema, torch.full((9,), 2), seed=5)).permute(0, 2, 3, 1).numpy()
    assert abs(close.astype(int) - x).max() <= 1


def test_read_by_others(tmp_path):
    "As a data set by torchvision and by us, deep by torch-fidelity; one class, one image"
    folder = sample_run('twins', 1, out=f'{tmp_path}/v1.0/')
    assert folder == tmp_path/'v1.0' and len(ImageFolder(folder)) == 4
    assert load_images(str(folder), 32).classes == sorted(load_run('twins').classes)
    assert len(glob_samples_paths(str(folder), True, 'png', verbose=False)) == 4


def test_runs_of_all_kinds(tmp_path):
    "Without classes, with one, at 64 pixels, in float16: flat files, no labels, and nothing left over"
    free, one = made(tmp_path, size=64, g_attention=(16,)), made(tmp_path, 1, g_attention=())
    flat = sample_run(free, 10, out=tmp_path/'flat')
    assert len(list(flat.glob('*.png'))) == 10 and pixels(flat/'seed0-000009.png').shape == (64, 64, 3)
    with np.load(sample_run(free, 3, out=tmp_path/'flat.npz')) as a: assert a.files == ['arr_0']
    (tmp_path/'empty').mkdir()
    assert [f.name for f in sample_run(one, 1, out=tmp_path/'empty').iterdir()] == ['c0']
    assert sample_run(one, 2, truncation=.5) == tmp_path/'samples-seed0-truncation0.5-n2.png'
    assert pixels(tmp_path/'samples-seed0-truncation0.5-n2.png')[:, -70:].shape == (36, 70, 3)
    sample_run(free, 1, out=tmp_path/'cut', truncation=.5)
    assert [f.name for f in (tmp_path/'cut').iterdir()] == ['seed0-truncation0.5-000000.png']
    hidden = [f for f in tmp_path.rglob('.*')]
    assert not hidden


def test_a_thousand_classes(tmp_path):
    "A picture shows 20 of them, a folder has all; images come by turns, so that any part has many classes"
    r = made(tmp_path, 1000, g_attention=())
    assert pixels(sample_run(r, 2))[:, -70:].shape == (20*34 + 2, 70, 3)
    assert sum(len(x) for x in draw_batches(r.model.ema, range(1000), 1)) == 1000
    folder = sample_run(r, 1, range(995, 1000), out=tmp_path/'some')
    assert {f.name for f in folder.iterdir()} == {f'c{i}' for i in range(995, 1000)}
    assert describe_samples(r.classes, None, 50, 'a.npz').startswith('50,000 images, 50 for each of c0, c1')
    assert describe_samples([], None, 3, 'a/') == '3 images'


def test_many_images_are_never_in_memory_together(tmp_path):
    "Batches are written as they are drawn, in a folder that appears when it is whole"
    drawn = []
    def count(*args):
        for x in draw_batches(*args):
            drawn.append(len(x))
            assert not (tmp_path/'many').exists()
            yield x
    with patch.object(sampling, 'draw_batches', count):
        r = made(tmp_path, 3, g_attention=())
        assert len(list(sample_run(r, 340, out=tmp_path/'many').rglob('*.png'))) == 1020
    assert max(drawn) == 8 and sum(drawn) == 1020


def test_a_folder_that_a_file_manager_has_opened(tmp_path):
    "It is as good as empty"
    (tmp_path/'new').mkdir()
    (tmp_path/'new'/'.DS_Store').write_text('', encoding='utf-8')
    sample_run(made(tmp_path/'run', 2, g_attention=()), 1, out=tmp_path/'new')
    assert sum(f.suffix == '.png' for f in (tmp_path/'new').rglob('*')) == 2


def test_a_failure_leaves_nothing(tmp_path):
    "No half of a folder or of an archive"
    def fail(*args):
        yield from draw_batches(*args[:2], 2)
        raise OSError(28, 'No space left on device')
    r = made(tmp_path/'run', 2, g_attention=())
    with patch.object(sampling, 'draw_batches', fail):
        for out in ('a/b/new', 'new.npz'):
            with pytest.raises(OSError, match='No space left on device'): sample_run(r, out=tmp_path/out)
    assert not list(tmp_path.iterdir())


def test_names_of_folders(tmp_path):
    "Classes may be called anything: each has a folder of its own that a scan of images finds"
    names = [n.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace') for n in NAMES]
    names += ['', '.', '..', '.hidden', 'a/b', 'a:b', '/etc', 'x'*300]
    names += ['con', 'NUL', 'aux.jpg', 'Com1', 'lpt\xb2', 'a.', 'a ', 'a_', f'{len(names)}-con']
    folders = class_folders(names)
    assert max(Counter(f.casefold() for f in folders).values()) == 1
    for f in folders:
        (tmp_path/f).mkdir()
        assert f[0] != '.' and '/' not in f
        assert f[-1] not in '. ' and f.split('.')[0].lower() not in ('con', 'nul', 'aux', 'com1', 'lpt\xb2')
    assert class_folders(['3', 'cat', 'salt, pepper', 'cone']) == ['3', 'cat', 'salt, pepper', 'cone']


def test_archives_are_the_same_twice(tmp_path):
    "Also byte by byte, and larger arrays could follow"
    r = made(tmp_path, 2, g_attention=())
    a, b = [sample_run(r, 2, out=tmp_path/n).read_bytes() for n in ('a.npz', 'b.npz')]
    assert a == b and zipfile.ZipFile(io.BytesIO(a)).namelist() == ['arr_0.npy', 'arr_1.npy']


@pytest.mark.parametrize('t', [1e-9, .1, 1., 2.5])
def test_truncated_latents_are_truncated_normal(t):
    "By the distances of their quantiles from SciPy's; values within the threshold stay"
    z = seeded_latents(200, 128, 3)
    cut = truncate(z, t)
    assert cut.dtype == z.dtype and (cut.abs() <= t).all() and torch.equal(cut[z.abs() <= t], z[z.abs() <= t])
    assert kstest(cut.flatten().double(), truncnorm(-t, t).cdf).pvalue > .01
    assert torch.equal(truncate(z[7:9], t), cut[7:9])


def test_truncation(tmp_path):
    "Diversity falls; the generator stays as it is, and image i is the same in every output"
    G = load_run('digits').model.ema
    before = {k: v.clone() for k, v in G.state_dict().items()}
    cut = truncated_generator(G, .2, 64)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items()) and not cut.training
    spread, less = [draw_rows(g, [3, 8], 16).std(1).mean().item() for g in (G, cut)]
    assert less < .6*spread
    again = truncated_generator(G, .2, 64)
    assert torch.equal(draw_rows(cut, [8], 3)[0], draw_rows(again, [3, 8], 11)[1, :3])
    assert truncated_generator(made(tmp_path).model.ema, 1., 8)(torch.zeros(1, 8)).shape == (1, 3, 32, 32)
    same, changed = [draw_rows(g, [3, 8], 8) for g in (G, truncated_generator(G, 100.))]
    assert 0 < (same - changed).abs().mean() < .2
    for f in (sample_run, cli.sagan_sample): assert 'averages are recomputed' in docments(f)['truncation']


def test_averages_of_all_classes(monkeypatch, tmp_path):
    "Up to as many classes as images come in turn; of more, every part of the list has its share, mixed"
    labels = []
    monkeypatch.setattr(sampling, 'standing_statistics', lambda G, y, *args, **kw: labels.append(y))
    for n_classes in (0, 1, 10, 500, 512, 1000):
        truncated_generator(made(tmp_path, n_classes, g_attention=()).model.ema, 1.)
    none, *few, many = labels
    assert none is None and len(few) == 4
    for y, n_classes in zip(few, (1, 10, 500, 512)): assert torch.equal(y, torch.arange(512) % n_classes)
    assert len(many.unique()) == 512 and 0 <= many.min() <= many.max() < 1000
    assert all(25 <= n <= 26 for n in torch.bincount(many//50))
    assert all(len((batch//100).unique()) == 10 for batch in many.split(64))


def test_eight_at_a_time():
    "The mode of the generator comes back, and latents stay in order"
    G = load_run('digits').model.ema.train()
    z, y = seeded_latents(11, 128), torch.arange(11) % 10
    x = torch.cat(list(draw_eights(G, z, y)))
    assert G.training and torch.equal(x[9], draw_rows(G.eval(), [9], 10)[0, 9])


def test_samples_of_one_class_are_not_said_to_have_rows():
    assert describe_samples(['horse'], None, 2) == '2 images of class horse'
    assert describe_samples(['cat', 'dog'], ['dog'], 3, 'a.npz') == '3 images of class dog'
    assert describe_samples(['cat', 'dog'], None, 3000) == '6,000 images, 3,000 for each of cat, dog'


def test_nearest(tmp_path, monkeypatch):
    "A training image drawn by accident is at distance 0; all of one class, and those of the first classes"
    monkeypatch.chdir(tmp_path)
    quick = patch('sagan.measuring.train_evaluator', partial(train_evaluator, steps=2))
    few = patch('sagan.references.MAX_FEATURES', 300)  # all images are searched, not only those
    with quick, few, patch.object(sampling, '_draw_numbered', lambda *_: to_unit(digits().x[:3])):
        near = nearest_run('digits', n=3)
    assert near['distances'] == pytest.approx([0, 0, 0], abs=1e-3) and near['usual'] > .001
    assert near['picture'].name == 'digits-neighbors-seed0-n3.png' and near['picture'].exists()
    G = load_run('digits').model.ema
    numbered = sampling._draw_numbered(G, 10, None, 12, 0)
    assert torch.equal(numbered[11], draw_rows(G, [1], 12)[0, 11])
    assert torch.equal(sampling._draw_numbered(G, 10, 4, 12, 0), draw_rows(G, [4], 12)[0])
