"A run begins from another one: which weights it takes over, on the same, other or no classes"
import json, shutil
from functools import partial
from pathlib import Path

import pytest, torch
from PIL import Image
from safetensors.torch import load_file
from sagan.checkpoints import read_log, read_state, Run, state_file
from sagan.config import presets
from sagan.data import digits, image_dls, Images
from sagan.networks import generate
from sagan.runs import evaluate_run, load_run, resume_run, train_run
from sagan.sampling import nearest_run
from sagan.spectral import spectral_layers
from sagan.starting import choose_config, init_from, run_images, starting_config, suit_config
from sagan.training import SAGAN, sagan_learner

CFG = presets['tiny'].change(batch=4, z_dim=8, d_attention=(), dtype='float32')
X, Z = torch.rand(4, 3, 32, 32)*2 - 1, torch.randn(4, 8)
CLASSES = ['ant', 'bee', 'cat']


def made(classes, **changes):
    "A run of untrained networks whose class tables and batch norms differ from those of any other"
    cfg = CFG.change(n_classes=len(classes), seed=1, **changes)
    model = SAGAN(cfg).eval()
    torch.manual_seed(2)
    for name, v in model.state_dict().items():
        if any(part in name for part in ('gain', 'bias', 'bn')) and v.is_floating_point():
            v.add_(torch.rand(v.shape)/2)
    model.requires_grad_(False)
    return Run(Path('other'), model, cfg, list(classes), 5, [])


def images(classes, n=8):
    "A few digits whose classes have other names"
    y = torch.arange(n) % max(1, len(classes))
    return Images(digits().x[:n], y, list(classes), 'renamed', 'none')


def begun(run, classes, **changes):
    "A learner on images of some classes that begins from a run"
    learn = sagan_learner(image_dls(images(classes), 4, steps=1), run.cfg, seed=0, **changes)
    init_from(learn, run)
    learn.model.eval().requires_grad_(False)
    return learn


def labels(*names): return torch.tensor([CLASSES.index(c) for c in names])


def check_norms(D):
    "The kept vectors of spectral norm are those of the weights that they are for"
    for name, sn, W in spectral_layers(D.head):
        torch.testing.assert_close(sn.sigma(W), torch.linalg.matrix_norm(W, 2))


def test_classes_of_the_same_name_draw_the_same_images():
    "In another order, beside a new one; the new one has the rows of one that is not there any more"
    run = made(CLASSES)
    new = begun(run, ['cat', 'dog', 'ant']).model
    for k in ('G', 'ema'):
        G, old = getattr(new, k), getattr(run.model, k)
        y = labels('cat', 'ant', 'cat', 'ant')
        torch.testing.assert_close(G(Z, torch.tensor([0, 2, 0, 2])), old(Z, y))
        torch.testing.assert_close(G(Z, torch.ones(4, dtype=torch.int64)), old(Z, labels(*4*['bee'])))
    embed = [m.D.head.embed.parametrizations.weight.original for m in (new, run.model)]
    torch.testing.assert_close(embed[0], embed[1][[2, 1, 0]])
    assert not torch.equal(run.model.G.linear.bias, run.model.ema.linear.bias)
    check_norms(new.D)


def test_from_no_classes_to_some():
    "Each class draws what the generator drew, and the discriminator has new embeddings, which differ"
    run = made([])
    new = begun(run, CLASSES).model
    y = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(new.ema(Z, y), run.model.ema(Z))
    assert torch.equal(new.D.head.linear.weight, run.model.D.head.linear.weight)
    assert new.D.head.embed.weight.unique(dim=0).shape[0] == 3
    check_norms(new.D)


def test_from_some_classes_to_none():
    "The discriminator's verdict is the mean over the classes, but for a factor"
    run = made(CLASSES)
    new = begun(run, []).model
    bn, old = new.G.blocks[0].bn1, run.model.G.blocks[0].bn1
    torch.testing.assert_close(bn.bn.weight, 1 + old.gain.weight.mean(0))
    torch.testing.assert_close(bn.bn.bias, old.bias.weight.mean(0))
    bias = run.model.D.head.linear.bias
    mean = torch.stack([run.model.D(X, torch.full((4,), c)) for c in range(3)]).mean(0) - bias
    factors = (new.D(X) - bias)/mean
    torch.testing.assert_close(factors, factors[0].expand(4))
    assert factors[0] > 0
    check_norms(new.D)


def test_the_auxiliary_head():
    run = made(CLASSES, head='auxiliary')
    new = begun(run, ['dog', 'bee']).model
    classify, old = new.D.head.classify, run.model.D.head.classify
    W, V = (m.parametrizations.weight.original for m in (classify, old))
    torch.testing.assert_close(W, V[:2])
    torch.testing.assert_close(classify.bias, old.bias[:2])
    check_norms(new.D)


def test_a_run_of_one_network():
    "As imported: the other network is new"
    run = made(CLASSES)
    run.model.G = run.model.ema = None
    run.cfg = run.cfg.change(g_width=())
    cfg = starting_config(run, g_width=2)
    learn = sagan_learner(image_dls(images(CLASSES), 4, steps=1), cfg, seed=0)
    own = learn.model.G.linear.bias.clone()
    init_from(learn, run)
    assert torch.equal(learn.model.G.linear.bias, own)
    assert torch.equal(learn.model.D.head.linear.bias, run.model.D.head.linear.bias)


@pytest.mark.parametrize('changes, message', [
    (dict(d_width=3), 'd_width is 4 in other, but 3 was requested, and weights fit only networks of'),
    (dict(g_attention=()), r'g_attention is \(16,\) in other, but \(\) was requested'),
    (dict(form='preprint'), "form is 'released' in other")], ids=str)
def test_other_networks_are_refused(changes, message):
    run = made(CLASSES)
    with pytest.raises(ValueError, match=message): starting_config(run, **changes)
    with pytest.raises(ValueError, match=message): begun(run, CLASSES, **changes)


def test_what_no_run_and_no_name_says():
    run = made(CLASSES)
    learn = sagan_learner(image_dls(images(CLASSES), 4, steps=1), run.cfg)
    with pytest.raises(ValueError, match=r"a loaded run, such as load_run\('digits'\), got 'digits'"):
        init_from(learn, 'digits')
    with pytest.raises(ValueError, match='3 classes, but there are 2 class names'):
        init_from(learn, run, ['a', 'b'])


def test_a_preset_gives_all_but_the_networks():
    run = made(CLASSES)
    cfg = starting_config(run, 'cifar', lr_g=3e-4)
    assert (cfg.g_width, cfg.d_attention, cfg.z_dim) == (2, (), 8)
    assert (cfg.lr_g, cfg.n_d, cfg.ema_start) == (3e-4, 5, 0)


AUGMENTED = 'translation,cutout'

@pytest.mark.parametrize('data, classes, given, expected', [
    ('pictures', [], {}, dict(steps=10_000, n_d=1, diffaug=AUGMENTED, batch=8)),
    ('pictures', CLASSES, {}, dict(steps=10_000, n_d=1, diffaug=AUGMENTED, batch=8)),
    ('pictures', [], dict(steps=7, n_d=2, diffaug='', batch=4), {}),
    ('pictures', [], dict(preset='photos'), dict(steps=10_000, n_d=1, diffaug=AUGMENTED, batch=8)),
    ('pictures', [], dict(preset='small'), dict(steps=1800, n_d=1, diffaug='', batch=16)),
    ('digits', CLASSES, {}, dict(steps=1800, n_d=1, diffaug='', batch=32))], ids=str)
def test_the_images_decide_also_after_a_start(data, classes, given, expected):
    "Eight images: steps of the preset for them, and what a folder decides; what is given wins"
    run = made(CLASSES)
    run.cfg = run.cfg.change(steps=72_000, batch=32, data='elsewhere')
    config = {k: v for k, v in given.items() if k != 'preset'}
    preset, cfg = choose_config(given.get('preset'), data, run, config)
    cfg, _ = suit_config(cfg, preset, images(classes), run, config)
    assert {k: getattr(cfg, k) for k in expected | config} == expected | config


@pytest.mark.parametrize('given, expected, said', [
    ({}, '', '; for these images diffaug=none'), (dict(diffaug=AUGMENTED), AUGMENTED, '')], ids=str)
def test_many_images_after_few(given, expected, said):
    "2,000 images are not augmented because the other run had few; what is given, or otherwise set, stays"
    run, many = made(CLASSES), images([])
    many.x, many.y = many.x[:1].expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.int64)
    for before, after, note in ((AUGMENTED, expected, said), ('color', given.get('diffaug', 'color'), '')):
        run.cfg = run.cfg.change(diffaug=before)
        preset, cfg = choose_config(None, 'pictures', run, given)
        cfg, told = suit_config(cfg, preset, many, run, given)
        assert (cfg.diffaug, told) == (after, note)


def test_one_image_is_too_few():
    run = made(CLASSES)
    with pytest.raises(ValueError, match='training needs at least 2 images, got 1 in renamed; add images'):
        suit_config(run.cfg, 'photos', images([], 1), None, {})


def silent(text): pass


@pytest.fixture(scope='module', autouse=True)
def quick_report():
    "An empty report, as no test is about it"
    def write(run, images, best=None): (run.folder/'report.html').touch()
    with pytest.MonkeyPatch.context() as m:
        m.setattr('sagan.runs.write_report', write)
        yield


def save(folder, classes):
    "A few digits as a folder of images"
    for i, x in enumerate(digits().x[:8]):
        (folder/classes[i%len(classes)]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder/classes[i%len(classes)]/f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Two folders with one class in common"
    root = tmp_path_factory.mktemp('data')
    return save(root/'a', ['cat', 'dog']), save(root/'b', ['bee', 'cat', 'elk'])


@pytest.fixture(scope='module')
def first(tmp_path_factory, data):
    "A run of two steps, whose weights another one begins with"
    folder = tmp_path_factory.mktemp('first')/'run'
    return train_run(data[0], folder, 'tiny', batch=4, z_dim=8, d_attention=(), dtype='float32', steps=2,
                     device='cpu', tell=silent)


def test_a_run_from_another_on_other_classes(first, data, tmp_path):
    "It needs the other one only when it begins, and says in its folder where that was"
    other, told = shutil.copytree(first.folder, tmp_path/'other'), []
    asked = dict(lr_g=1e-4, device='cpu')
    run = train_run(data[1], tmp_path/'a', init_from=other, steps=4, tell=told.append, **asked)
    few = dict(diffaug='translation,cutout')  # what a small folder changes of rates like these
    assert told[0].endswith(f'; for these images diffaug={few["diffaug"]}; starts from {other} at step 2')
    assert run.cfg == first.cfg.change(
        data=str(data[1]), n_classes=3, ema_start=0, lr_g=1e-4, steps=4, **few)
    began = json.loads((run.folder/'config.json').read_text(encoding='utf-8'))['options']['init_from']
    assert (began['run'], began['step'], began['classes']) == (str(other), 2, ['cat'])
    assert [r.get('init_from') for r in run.records] == [began, None, None, None]
    train_run(data[1], tmp_path/'b', init_from=load_run(other), steps=3, tell=silent, **asked)
    shutil.rmtree(other)
    state = read_state(state_file(tmp_path/'b', 2))['model']
    resumed = resume_run(tmp_path/'b', steps=4, device='cpu', tell=silent)
    a, b = (load_file(r.folder/'weights.safetensors') for r in (run, resumed))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert any(not torch.equal(v, b[k]) for k, v in state.items())


def test_a_run_killed_before_its_first_state_begins_again(first, tmp_path):
    "It cannot be resumed, as nothing of the other run is there; the same command replaces it"
    folder = tmp_path/'run'
    def train(): return train_run(None, folder, init_from=first, steps=1, device='cpu', tell=silent)
    train()
    for f in ('states', 'samples'): shutil.rmtree(folder/f)
    for f in ('weights.safetensors', 'log.jsonl', 'report.html'): (folder/f).unlink()
    with pytest.raises(ValueError, match='stopped before its first training state, so it lacks the weights'):
        resume_run(folder, device='cpu', tell=silent)
    assert train().step == 1
    saved = read_state(state_file(folder, 0))['model']
    assert all(torch.equal(v, saved[k]) for k, v in first.model.state_dict().items())


def test_the_images_of_the_other_run_are_gone(first, tmp_path):
    "In each function that would read them: it says what is missing, and what to name"
    run = Run(first.folder, first.model, first.cfg.change(data='cifar10'), first.classes, 2, first.records)
    for call in (partial(train_run, out=tmp_path/'run', init_from=run, device='cpu'),
                 partial(evaluate_run, run), partial(nearest_run, run),
                 partial(run_images, None, run.cfg, run.classes)):
        with pytest.raises(FileNotFoundError, match='was trained on a folder cifar10, .* with --data FOLDER'):
            call()
    assert not list(tmp_path.iterdir())


def test_what_it_cannot_begin_from(first, tmp_path):
    "Refused before anything is written"
    cases = {'is not a run folder': dict(init_from=tmp_path), 'size is 32 in': dict(init_from=first, size=64),
             'there is no folder': dict(init_from=first, data=tmp_path/'none')}
    for message, asked in cases.items():
        with pytest.raises((ValueError, OSError), match=message):
            train_run(out=tmp_path/'run', device='cpu', tell=silent, **asked)
        assert not (tmp_path/'run').exists()
