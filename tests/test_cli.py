"What a page cannot hold: the installed commands as processes, their exit statuses, and Ctrl-C"
import dataclasses, gc, inspect, json, os, re, runpy, shlex, signal, subprocess, sys, time
from functools import partial
from unittest.mock import patch
import pytest, sagan
from fastcore.docments import docments
from forked import BIN, command, new_process
from machines import posix
from sagan import __main__ as main, cli, options
from sagan.config import Config, presets
from sagan.runs import load_run

CAPTURED = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
TINY = ['--steps', '20', '--batch', '16', '--g-width', '2', '--d-width', '4']

def start(name, *args, cwd):
    return subprocess.Popen([BIN/name, *args], cwd=cwd, **CAPTURED)

def refused(done, status, *words):
    assert done.returncode == status, done.stderr
    assert 'Traceback' not in done.stderr
    for w in words: assert w in done.stderr

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with one finished tiny run, made by the default command line in a new process"
    tmp = tmp_path_factory.mktemp('cli')
    done = new_process(BIN/'sagan-train', *TINY, cwd=tmp)
    assert done.returncode == 0, done.stderr
    assert done.stderr == 'preparing to train ...\n'  # its first word
    assert 'open runs/digits/report.html' in done.stdout
    return tmp

def test_default_run_leaves_a_whole_folder(folder):
    run = folder/'runs/digits'
    files = {p.name for p in run.iterdir()}
    assert files == {'.lock', 'config.json', 'log.jsonl', 'samples', 'states', 'weights.safetensors',
                     'attention.png', 'report.html'}
    assert {p.name for p in (run/'states').iterdir()} == {'step-0000018.pt', 'step-0000020.pt'}
    log = (run/'log.jsonl').read_text(encoding='utf-8').splitlines()
    assert [json.loads(l)['step'] for l in log] == list(range(2, 21, 2))

@pytest.mark.parametrize('name, made', [
    ('sagan-sample', 'samples-seed0.png'),
    ('sagan-attend', 'attention-seed0.png'),
    ('sagan-eval', 'eval.json'),
])
def test_works_from_the_run_folder_alone(folder, name, made):
    done = command(name, 'runs/digits', cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder/'runs/digits'/made).stat().st_size > 100

def test_eval_tells_intra_fid_and_draws_the_nearest_images(folder, monkeypatch, capsys):
    "Both beside the other scores, under the name of what was asked for"
    from PIL import Image
    from sagan import measuring, references
    monkeypatch.setattr(measuring, 'train_evaluator', partial(references.train_evaluator, steps=50))
    monkeypatch.chdir(folder)
    # about ten images of a class, 64 features
    with pytest.warns(match='the intra-FID comes out too large'): cli.sagan_eval('runs/digits', n=100)
    out = capsys.readouterr().out
    kept = json.loads((folder/'runs/digits/eval-n100.json').read_text(encoding='utf-8'))
    said = out.splitlines()
    assert kept['intra_fid'] > 0 and f'intra-FID         {kept["intra_fid"]:.4g}' in said
    assert 'None' not in out and '_' not in out  # words, and only what was measured
    assert 'nearest images    runs/digits/nearest-n100.png' in said
    assert min(Image.open(folder/'runs/digits/nearest-n100.png').size) > 300

def test_nearest_images_are_of_the_images_measured(folder, monkeypatch):
    "The first 8 of them, each with three real images that no other one is nearer than"
    import torch
    from dataclasses import replace
    from sagan import evaluation, measuring, references, reports
    from sagan.data import digits, to_unit
    shown, measured = {}, []
    def figure(x, near, distance, usual, among):
        shown.update(x=x, near=near, distance=distance, usual=usual, among=among)
    def score(x, *args):
        measured.extend(x)
        return evaluation.score(torch.cat(measured), *args)
    monkeypatch.setattr(reports, 'nearest_figure', figure)
    monkeypatch.setattr(measuring, 'score', score)
    images, evaluator = digits(), references.train_evaluator(digits(), 20)
    real, G = references.reference(images, evaluator), load_run(folder/'runs/digits').model.ema
    measuring.measure_generator(G, images, evaluator, real, 30, 5)
    reports.draw_nearest(G, images, evaluator, real, 30, 5)
    x = torch.cat(measured)[:8]
    assert torch.allclose(shown['x'], x, atol=1e-4)  # drawn in a batch of another size
    found, distance = evaluation.nearest_images(shown['x'], images, evaluator)
    assert torch.equal(shown['near'], to_unit(images.x[found]))
    assert torch.allclose(shown['distance'], distance, atol=1e-4) and shown['usual'] > 0
    assert shown['among'] == ''
    part = replace(real, features=real.features[:100])
    for where, among in ((part, 'among 100 of 1,797'), (images, '')):
        reports.draw_nearest(G, images, evaluator, where, 30, 5)
        assert shown['among'] == among
    assert torch.equal(shown['near'], to_unit(images.x[found]))

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
    (tmp_path/'data/text.jpg').write_text('not an image', encoding='utf-8')
    done = command('sagan-train', '--data', 'data', *TINY, cwd=tmp_path)
    refused(done, 1, 'zero.png (zero bytes)', 'text.jpg', '--skip-bad')
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
    (dict(a=3, b=3), ('--batch', '16'), 'batch must be from 2 to 6, the number of images in data, got 16; '),
    (dict(a=8, b=8), ('--batch', '4', '--size', '48'), 'size must be 32, 64, 128 or 256'),
    (dict(a=8, b=8), ('--batch', '4', '--g-attention', '64'), 'no 64x64 feature map'),
])
def test_data_that_does_not_fit(tmp_path, classes, args, words):
    (tmp_path/'data').mkdir()
    folder_of(tmp_path, **classes)
    widths = '--g-width', 2, '--d-width', 4
    refused(command('sagan-train', '--data', 'data', *widths, *args, cwd=tmp_path), 1, words)
    assert not (tmp_path/'runs').exists()

def test_class_out_of_range(folder):
    done = command('sagan-sample', 'runs/digits', '--classes', '10', cwd=folder)
    refused(done, 1, 'no class 10', '0, 1, 2')

def test_arguments_of_the_wrong_form(tmp_path):
    refused(command('sagan-train', '--size', 'big', cwd=tmp_path), 2, 'big')

def test_weights_of_another_configuration(folder, tmp_path):
    other = tmp_path/'other'
    other.mkdir()
    for f in ('config.json', 'weights.safetensors'):
        (other/f).write_bytes((folder/'runs/digits'/f).read_bytes())
    c = json.loads((other/'config.json').read_text(encoding='utf-8'))
    c['config']['d_width'] = 8
    (other/'config.json').write_text(json.dumps(c), encoding='utf-8')
    refused(command('sagan-sample', other, cwd=tmp_path), 1, 'd_width is 4 there and 8 here')

@posix
def test_interrupt_at_once(tmp_path):
    "While the imports run, too: no traceback, nothing left"
    p = start('sagan-train', *TINY, cwd=tmp_path)
    time.sleep(2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 1 and 'Traceback' not in err and 'interrupted' in err, err
    assert not list(tmp_path.iterdir())

def test_an_interrupt_that_an_import_swallows(monkeypatch, capsys):
    "While modules load, Ctrl-C ends the process, whatever an import makes of it; then all is as before"
    before, left = signal.getsignal(signal.SIGINT), []
    monkeypatch.delitem(sys.modules, 'torch')
    monkeypatch.setattr(os, '_exit', left.append)
    with options.loading('drawing images'):
        assert not gc.isenabled()
        signal.raise_signal(signal.SIGINT)
    assert left == [1] and capsys.readouterr().err == 'drawing images ...\ninterrupted\n'
    assert signal.getsignal(signal.SIGINT) is before and gc.isenabled()

@posix
def test_interrupt_keeps_a_checkpoint(tmp_path):
    p = start('sagan-train', *TINY, '--steps', '100000', cwd=tmp_path)
    log = tmp_path/'runs/digits/log.jsonl'
    for _ in range(3000):
        if log.exists() and log.stat().st_size: break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 1 and 'Traceback' not in err and 'interrupted at step' in err, err
    run = load_run(tmp_path/'runs/digits')
    assert run.step >= 10 and f'step {run.step:,} of 100,000' in err
    assert not [f for f in os.listdir(tmp_path/'runs/digits') if f.endswith('.new')]
    done = command('sagan-sample', 'runs/digits', cwd=tmp_path)
    assert done.returncode == 0, done.stderr

def test_options_that_are_lists():
    "With spaces, and with none to switch them off, in each command that has them"
    given = dict(diffaug='color, cutout'), dict(diffaug='none', g_attention='none')
    with patch('sagan.runs.train_run') as train, patch('sagan.runner.experiment_run') as experiment:
        experiment.side_effect = ValueError('read')
        for fields in given:
            cli.sagan_train(**fields)
            with pytest.raises(SystemExit): cli.sagan_experiment('table1', **fields)
    for call in (train, experiment):
        assert [c.kwargs['diffaug'] for c in call.mock_calls] == ['color,cutout', '']

def words_of(capsys, name, *args, **kw):
    "The message of a command, called in this process, that must end with exit status 1"
    with pytest.raises(SystemExit) as e: getattr(cli, f'sagan_{name}')(*args, **kw)
    assert e.value.code == 1
    return capsys.readouterr().err.strip()

@pytest.mark.parametrize('message, name, kw', [
    ('train: there is no folder', 'train', dict(data='nowhere')),
    ('train: size must be 32, 64, 128 or 256', 'train', dict(size=48)),
    ('train: the generator has no 64x64 feature map', 'train', dict(g_attention='64')),
    ('train: attention must be none, or a list of sizes', 'train', dict(g_attention='16;8')),
    ('train: batch must be from 2 to 1,797, the number of images', 'train', dict(batch=4096)),
    ("train: there is no preset 'bigan'; did you mean biggan", 'train', dict(preset='bigan')),
    ("train: preset 'cifar' names no data", 'train', dict(preset='cifar')),
    ('train: n_classes must be 10, the number of classes of digits, or 0', 'train', dict(n_classes=7)),
    ('train: the size of twins must be 32 or 64 pixels, got 128', 'train', dict(data='twins', size=128)),
    ('train: lr_g must be positive and finite, got -1.0', 'train', dict(lr_g=-1.)),
    ('train: keep must be a whole number, at least 1, got 0', 'train', dict(keep=0)),
    ("train: on_nan must be 'stop' or 'rollback', got 'skip'", 'train', dict(on_nan='skip')),
    ("train: evaluator must be 'small' or 'inception', got 'vgg'", 'train', dict(evaluator='vgg')),
    ("experiment: there is no experiment 'table3'", 'experiment', dict(experiment='table3')),
    ('experiment: the rows of an experiment', 'experiment', dict(experiment='table1', g_attention='16')),
])
def test_a_new_run_that_cannot_be(tmp_path, capsys, message, name, kw):
    assert words_of(capsys, name, out=str(tmp_path/'new'), **kw).startswith(f'sagan-{message}')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('message, name, kw', [
    ('train: {run} already holds a run; choose another folder with --out', 'train', dict(out='{run}')),
    ('train: --resume names the run folder; leave out --out', 'train', dict(resume='{run}', out='new')),
    ('train: {run} is finished: it has done 20 steps, and 20 were requested', 'train', dict(resume='{run}')),
    ('train: {run} is finished: it has done 20 steps', 'train', dict(resume='{run}', steps=10)),
    ('train: batch is 16 in {run}, but 8 was requested', 'train', dict(resume='{run}', steps=40, batch=8)),
    ('train: size is 32 in {run}, but 128 was', 'train', dict(resume='{run}', steps=40, preset='official')),
    ('train: the run has classes 0, 1, 2', 'train', dict(resume='{run}', steps=40, data='twins')),
    ('train: nowhere is not a run folder', 'train', dict(resume='nowhere')),
    ('experiment: {run} holds other', 'experiment', dict(experiment='figure3', out='{run}', preset='tiny')),
    ('eval: {run}/config.json is not a file of', 'eval', dict(run='{run}', weights='{run}/config.json')),
    ("eval: evaluator must be 'small' or 'inception', got 'vgg'", 'eval', dict(run='{run}', evaluator='vgg')),
    ('eval: n must be a whole number, at least 10, got 0', 'eval', dict(run='{run}', n=0)),
    ('eval: n must be a whole number, at least 10, got 5', 'eval', dict(run='{run}', n=5)),
    ('sample: nowhere is not a run folder', 'sample', dict(run='nowhere')),
    ('sample: there is no class 10; the classes are 0, 1', 'sample', dict(run='{run}', classes='10')),
    ('attend: there is no attention at 8x8', 'attend', dict(run='{run}', layer=8)),
    ('attend: ', 'attend', dict(run='{run}', points='40,2')),
    ('attend: points must be pairs row,column', 'attend', dict(run='{run}', points='8 8')),
    ('attend: n must be a whole number, at least 1, got 0', 'attend', dict(run='{run}', n=0)),
    ("attend: the device 'warp' is not available", 'attend', dict(run='{run}', device='warp')),
    ('explore: cats is not a run folder (it has no config.json); create one with sagan-train, or name one '
     'that comes with the package: digits, photographs, twins', 'explore', dict(run='cats')),
    ('import: no run folder was given; name the one to create with --out', 'import', dict(eps=1e-5)),
])
def test_what_a_run_cannot_do(folder, capsys, message, name, kw):
    run = folder/'runs/digits'
    before = sorted(folder.rglob('*'))
    kw = {k: v.format(run=run) if isinstance(v, str) else v for k, v in kw.items()}
    assert words_of(capsys, name, **kw).startswith(f'sagan-{message.format(run=run)}')
    assert sorted(folder.rglob('*')) == before

def test_a_wrong_option_is_refused_with_the_nearest_names(capsys):
    "With status 2, and by `sagan train`, too"
    for args, message in (
        (['--ema-begin', '5'], 'there is no option --ema-begin; did you mean --ema or --ema-start'),
        (['digits'], 'digits is not an option'), (['--qqqq'], 'no option --qqqq; --help lists')):
        with patch.object(sys, 'argv', ['sagan', 'train', *args]), pytest.raises(SystemExit) as e: main.main()
        said = capsys.readouterr().err
        assert e.value.code == 2 and said.startswith('sagan-train: ') and message in said

@pytest.mark.parametrize('command, args, message', [
    ('train', ['--cache', ''], 'cache got an empty text; give a value, or leave it out'),
    ('train', ['--init-from', ''], 'init-from got an empty text'),
    ('attend', ['digits', '--points', ''], 'points got an empty text'),
    ('report', ['digits', ''], 'runs got an empty text')])
def test_empty_text_is_refused(capsys, command, args, message):
    "As from a variable of the shell that is not set"
    with patch.object(sys, 'argv', ['sagan', command, *args]), pytest.raises(SystemExit) as e: main.main()
    assert e.value.code == 2 and capsys.readouterr().err.startswith(f'sagan-{command}: {message}')

def test_a_value_may_begin_with_a_minus():
    asked = 'sagan walk digits --seeds -1,2'.split()
    with patch('sagan.walks.walk_run') as walk, patch.object(sys, 'argv', asked): main.main()
    assert [-1, 2] in [*walk.call_args.args, *walk.call_args.kwargs.values()]

def test_the_command_for_all(tmp_path):
    "`sagan` and `python -m sagan`; what lists the commands and tells the version imports nothing heavy"
    assert {f.removeprefix('sagan_') for f in vars(cli) if f.startswith('sagan_')} == main.COMMANDS.keys()
    module = [sys.executable, '-X', 'importtime', '-m', 'sagan', '--version']
    done = subprocess.run(module, **CAPTURED)
    assert done.stdout == f'sagan {sagan.__version__}\n' and 'torch' not in done.stderr
    listed = subprocess.run([sys.executable, '-m', 'sagan'], **CAPTURED).stdout
    assert all(f'\n  {name} ' in listed for name in main.COMMANDS)
    done = subprocess.run([sys.executable, '-m', 'sagan', 'sample', 'nowhere'], cwd=tmp_path, **CAPTURED)
    refused(done, 1, 'sagan-sample: nowhere is not a run folder')
    page = tmp_path/'twins.html'
    with patch.object(sys, 'argv', ['sagan', 'explore', 'twins', '--out', str(page)]): main.main()
    assert page.exists()

def test_the_command_line_is_short():
    "It parses and prints; what a command does is a call of another module"
    assert len(inspect.getsource(cli).splitlines()) < 300
    parameters = {p.dest for p in options.make_parser(cli.sagan_import)._actions}
    assert parameters >= {'files', 'out', 'classes', 'eps', 'bgr', 'relu_skip'}

def parser(name): return options.make_parser(getattr(cli, f'sagan_{name}'))

def titles(name):
    "{title in help: options under it}"
    groups = parser(name)._action_groups
    return {g.title: [a.dest for a in g._group_actions] for g in groups if g._group_actions}

@pytest.mark.parametrize('name', ['train', 'experiment'])
def test_every_field_is_an_option_with_its_text(name):
    "Also in one of the groups of help; the ten that people use first come first"
    texts, actions = docments(Config), {a.dest: a for a in parser(name)._actions}
    own = inspect.signature(getattr(cli, f'sagan_{name}')).parameters
    for f in dataclasses.fields(Config):
        text = texts[f.name] if f.name not in own else docments(getattr(cli, f'sagan_{name}'))[f.name]
        assert actions[f.name].help.lower().startswith(text.lower()), f.name
        assert actions[f.name].default is None or f.name in own
    grouped = titles(name)
    assert set(grouped) >= {'Used most', *options.GROUPS, 'Run'}
    first, run = grouped['Used most'], grouped['Run']
    assert len(first) == 10 and first == options.FIRST[f'sagan_{name}']
    assert not set(run) & {f.name for f in dataclasses.fields(Config)}  # those are in the other groups
    known = {k for group in options.GROUPS.values() for k in group}
    assert known <= {a.dest for n in ('train', 'experiment') for a in parser(n)._actions}

@pytest.mark.parametrize('columns', ['50', '200'])
def test_help_fits(columns, monkeypatch):
    "80 columns at most, in a narrower terminal as many as it has"
    monkeypatch.setenv('COLUMNS', columns)
    for name in main.COMMANDS:
        widest = max(parser(name).format_help().splitlines(), key=len)
        assert len(widest) <= min(80, int(columns)), widest

def test_options_are_read_without_pytorch(tmp_path):
    "Help, mistyped options, impossible settings and names of nothing are answered before PyTorch is loaded"
    file = tmp_path/'sagan'
    nothing = (' is not a run folder (it has no config.json); create one with sagan-train, or name one that '
               'comes with the package: digits, photographs, twins')
    answers = {
        'train --help': '', 'train --ema-begin 5': 'there is no option',
        'train --size 48': 'size must be', 'train --preset bigan': 'there is no preset',
        'train --batch big': 'expected a whole number', 'train --bn-group 5': 'bn_group',
        'train --data nowhere': 'there is no folder nowhere;', 'train --resume nowhere': f'nowhere{nothing}',
        'train --init-from nowhere': f'nowhere{nothing}', 'train --device warp': "the device 'warp'",
        'experiment table1 --data nowhere': 'no folder nowhere;',
        'experiment table1 --size 48': 'size must be',
        'explore digits --images nowhere': 'no folder nowhere;', 'explore nowhere': f'nowhere{nothing}',
        'eval digits --data nowhere': 'no folder nowhere;', 'report digits nowhere': f'nowhere{nothing}',
        'sample nowhere': f'nowhere{nothing}', 'walk nowhere': f'nowhere{nothing}',
        'import nowhere --out new': 'there is no file nowhere;',
        **{f'{name} digits --device warp': f"sagan-{name}: the device 'warp' is not available"
           for name in ('sample', 'attend', 'walk', 'explore', 'eval', 'report')}}
    file.write_text(f"""import sys
from sagan.__main__ import main
for args in {list(answers)}:
    sys.argv[1:] = args.split()
    try: main()
    except SystemExit as e: print('status', e.code, file=sys.stderr)
print('torch' in sys.modules, file=sys.stderr)
""", encoding='utf-8')
    done = subprocess.run([sys.executable, file], cwd=tmp_path, **CAPTURED)
    assert 'usage: sagan-train [options]' in done.stdout
    *said, loaded = done.stderr.splitlines()
    assert loaded == 'False' and 'Traceback' not in done.stderr and ' ...' not in done.stderr
    status = iter(said)
    for args, message in answers.items():
        line = next(status) if message else ''
        code = 2 if message in ('there is no option', 'expected a whole number') else int(bool(message))
        assert message in line and next(status) == f'status {code}', (args, line)

def test_a_command_in_python_does_not_read_the_shell(tmp_path, monkeypatch):
    "Called by a function, or with arguments, it is a function like any other"
    monkeypatch.setattr(sys, 'argv', ['sagan-sample', '--nonsense'])
    with pytest.raises(TypeError): cli.sagan_sample()
    assert options.parse_options(cli.sagan_import, ['a', 'b', '--no-bgr'])[0] == ['a', 'b']
    assert options.parse_options(cli.sagan_import, ['--no-bgr'])[1]['bgr'] is False

@pytest.mark.parametrize('name', main.COMMANDS)
def test_help_of_every_command(name, capsys):
    "Two examples that can be parsed, the version, words to choose from, and nothing of Python"
    f = getattr(cli, f'sagan_{name}')
    lines = options.EXAMPLES[f'sagan_{name}']
    assert len(lines) == 2
    for program, *args in map(shlex.split, lines):
        assert program == f'sagan-{name}'
        options.parse_options(f, args)
    for option, first in (('--version', f'sagan {sagan.__version__}'), ('--help', f'usage: sagan-{name}')):
        with pytest.raises(SystemExit) as e: options.parse_options(f, [option])
        said = capsys.readouterr().out
        assert e.value.code == 0 and said.startswith(first)
    assert not re.search(r'`|None|True|False|sagan_|\w\(', said), said
    assert said.endswith('\n'.join(['Examples:', *(f'  {line}' for line in lines)]) + '\n')
    assert '--device {cuda,mps,cpu}' in said or name == 'import'
    # a value that begins a text keeps its letters, as `Table1` would be refused
    values = {'digits', 'table1', *presets, *(word for words in options._WORDS.values() for word in words)}
    first = {a.help.split()[0].strip(',') for a in parser(name)._actions}
    assert not [word for word in first - values if word.lower() in values]

def test_defaults_of_the_preset():
    "Exactly the fields of the configuration that are no option of the command itself"
    for name in ('train', 'experiment'):
        own = inspect.signature(getattr(cli, f'sagan_{name}')).parameters
        shown = {a.dest for a in parser(name)._actions if 'from the preset' in a.help}
        assert shown == {f.name for f in dataclasses.fields(Config)} - own.keys()
    assert not [a for a in parser('sample')._actions if 'from the preset' in a.help]

def test_the_module_of_the_commands_starts_none(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['sagan.cli', '--steps', '1'])
    monkeypatch.delitem(sys.modules, 'sagan.cli')
    with pytest.raises(SystemExit) as e: runpy.run_module('sagan.cli', run_name='__main__')
    assert e.value.code == 2 and 'python -m sagan COMMAND' in capsys.readouterr().err

def test_a_mistyped_command(capsys):
    with patch.object(sys, 'argv', ['sagan', 'trian']), pytest.raises(SystemExit) as e: main.main()
    assert e.value.code == 2 and 'there is no command trian; did you mean train?' in capsys.readouterr().err

def test_a_machine_without_a_compiler(capsys):
    "What PyTorch's compiler says, in a sentence"
    from torch._inductor.exc import InvalidCxxCompiler
    with pytest.raises(SystemExit) as e, cli.plain_errors('sagan-train'): raise InvalidCxxCompiler
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.startswith('sagan-train: PyTorch cannot compile here (')
    assert said.endswith('leave out --compile\n')
