"What a page cannot hold: the installed commands as processes, their exit statuses, and Ctrl-C"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from sagan.runs import load_run

BIN = Path(sys.executable).parent
TINY = ['--steps', '20', '--batch', '16', '--g-width', '2', '--d-width', '4']

def command(name, *args, cwd):
    return subprocess.run([BIN/name, *map(str, args)], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)

def refused(done, status, *words):
    assert done.returncode == status, done.stderr
    assert 'Traceback' not in done.stderr
    for w in words: assert w in done.stderr

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with one finished tiny run, made by the default command line"
    tmp = tmp_path_factory.mktemp('cli')
    done = command('sagan-train', *TINY, cwd=tmp)
    assert done.returncode == 0, done.stderr
    assert 'open runs/digits/report.html' in done.stdout
    return tmp

def test_default_run_leaves_a_whole_folder(folder):
    run = folder/'runs/digits'
    files = {p.name for p in run.iterdir()}
    assert files == {'.lock', 'config.json', 'log.jsonl', 'samples', 'states', 'weights.safetensors', 'attention.png', 'report.html'}
    assert {p.name for p in (run/'states').iterdir()} == {'step-0000018.pt', 'step-0000020.pt'}
    assert [json.loads(l)['step'] for l in (run/'log.jsonl').read_text().splitlines()] == list(range(2, 21, 2))

@pytest.mark.parametrize('name, made', [('sagan-sample', 'samples-seed0.png'), ('sagan-attend', 'attention-seed0.png'), ('sagan-eval', 'eval.json')])
def test_works_from_the_run_folder_alone(folder, name, made):
    done = command(name, 'runs/digits', cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder/'runs/digits'/made).stat().st_size > 100

def test_eval_tells_intra_fid_and_draws_the_nearest_images(folder):
    "Both beside the other scores, under the name of what was asked for"
    from PIL import Image
    done = command('sagan-eval', 'runs/digits', '--n', '100', cwd=folder)
    assert done.returncode == 0, done.stderr
    kept = json.loads((folder/'runs/digits/eval-n100.json').read_text())
    assert kept['intra_fid'] > 0 and f'intra_fid        {kept["intra_fid"]:.4g}' in done.stdout.splitlines()
    assert 'the intra-FID comes out too large' in done.stderr  # about ten images of a class, 64 features
    assert 'nearest images   runs/digits/nearest-n100.png' in done.stdout.splitlines()
    assert min(Image.open(folder/'runs/digits/nearest-n100.png').size) > 300

def test_nearest_images_are_of_the_images_measured(folder, monkeypatch):
    "The first 8 of them, each with three real images that no other one is nearer than"
    import torch
    from matplotlib.figure import Figure
    from sagan import checkpoints, cli, evaluation
    from sagan.data import digits, to_unit
    shown, measured = {}, []
    def figure(x, near, distance, usual):
        shown.update(x=x, near=near, distance=distance, usual=usual)
        return Figure()
    def score(x, *args):
        measured.extend(x)
        return evaluation.score(torch.cat(measured), *args)
    monkeypatch.setattr(cli, 'nearest_figure', figure)
    monkeypatch.setattr(checkpoints, 'score', score)
    images, judge = digits(), evaluation.train_evaluator(digits(), 20)
    real, G = evaluation.reference(images, judge), load_run(folder/'runs/digits').model.ema
    checkpoints.measure_generator(G, images, judge, real, 30, 5)
    cli._draw_nearest(folder/'picture.png', G, images, judge, real, 30, 5)
    x = torch.cat(measured)[:8]
    assert torch.allclose(shown['x'], x, atol=1e-4)  # drawn in a batch of another size
    found, distance = evaluation.nearest_images(shown['x'], images, judge)
    assert torch.equal(shown['near'], to_unit(images.x[found]))
    assert torch.allclose(shown['distance'], distance, atol=1e-4) and shown['usual'] > 0

def test_same_command_twice_is_refused_and_changes_nothing(folder):
    before = (folder/'runs/digits/weights.safetensors').stat().st_mtime_ns
    refused(command('sagan-train', *TINY, cwd=folder), 1, 'runs/digits already holds a run', '--out')
    assert (folder/'runs/digits/weights.safetensors').stat().st_mtime_ns == before

def test_missing_folder(tmp_path):
    refused(command('sagan-train', '--data', 'nowhere', cwd=tmp_path), 1, 'there is no folder nowhere')
    assert not list(tmp_path.iterdir())

def test_unreadable_images_are_named_and_left_out_on_request(tmp_path):
    from PIL import Image
    for i in range(20):
        (tmp_path/'data').mkdir(exist_ok=True)
        Image.new('RGB', (40, 40), (i, 200, 0)).save(tmp_path/f'data/{i}.png')
    (tmp_path/'data/zero.png').touch()
    (tmp_path/'data/text.jpg').write_text('not an image')
    refused(command('sagan-train', '--data', 'data', *TINY, cwd=tmp_path), 1, 'zero.png (zero bytes)', 'text.jpg', '--skip-bad')
    assert not (tmp_path/'runs').exists()
    done = command('sagan-train', '--data', 'data', '--skip-bad', *TINY, cwd=tmp_path)
    assert done.returncode == 0 and '20 images' in done.stdout, done.stderr

def folder_of(tmp, **classes):
    "tmp/data with so many images in each class"
    from PIL import Image
    for c, n in classes.items():
        (tmp/'data'/c).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (40, 40), (i, 100, 200)).save(tmp/'data'/c/f'{i}.png')

@pytest.mark.parametrize('classes, args, words', [
    (dict(), (), 'holds no images'),
    (dict(a=3, b=0), (), 'class without images in data: b'),
    (dict(a=3, b=3), ('--batch', '16'), 'the batch size must be from 1 to 6'),
    (dict(a=8, b=8), ('--batch', '4', '--size', '48'), 'size must be 32, 64, 128 or 256'),
    (dict(a=8, b=8), ('--batch', '4', '--g-attention', '64'), 'no 64x64 feature map'),
])
def test_data_that_does_not_fit(tmp_path, classes, args, words):
    (tmp_path/'data').mkdir()
    folder_of(tmp_path, **classes)
    refused(command('sagan-train', '--data', 'data', '--g-width', 2, '--d-width', 4, *args, cwd=tmp_path), 1, words)
    assert not (tmp_path/'runs').exists()

def test_class_out_of_range(folder):
    refused(command('sagan-sample', 'runs/digits', '--classes', '10', cwd=folder), 1, 'no class 10', '0, 1, 2')

def test_arguments_of_the_wrong_form(tmp_path):
    refused(command('sagan-train', '--size', 'big', cwd=tmp_path), 2, 'big')

def test_weights_of_another_configuration(folder, tmp_path):
    other = tmp_path/'other'
    other.mkdir()
    for f in ('config.json', 'weights.safetensors'):
        (other/f).write_bytes((folder/'runs/digits'/f).read_bytes())
    c = json.loads((other/'config.json').read_text())
    c['config']['d_width'] = 8
    (other/'config.json').write_text(json.dumps(c))
    refused(command('sagan-sample', other, cwd=tmp_path), 1, 'd_width is 4 there, 8 here')

def test_interrupt_at_once(tmp_path):
    "While the imports run, too: no traceback, nothing left"
    p = subprocess.Popen([BIN/'sagan-train', *TINY], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 1 and 'Traceback' not in err and 'interrupted' in err, err
    assert not list(tmp_path.iterdir())

def test_interrupt_keeps_a_checkpoint(tmp_path):
    p = subprocess.Popen([BIN/'sagan-train', *TINY, '--steps', '100000'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path/'runs/digits/log.jsonl'
    for _ in range(3000):
        if log.exists() and log.stat().st_size: break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 1 and 'Traceback' not in err and 'interrupted at step' in err, err
    run = load_run(tmp_path/'runs/digits')
    assert run.step >= 10 and f'step {run.step} of 100000' in err
    assert not [f for f in os.listdir(tmp_path/'runs/digits') if f.endswith('.new')]
    done = command('sagan-sample', 'runs/digits', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
