"""Make `folders.tar.xz` and `expected.json`, with the version of commit 1722e33 instead of this one:

    git worktree add /path/before 1722e33
    OMP_NUM_THREADS=1 PYTHONPATH=/path/before python tests/old/make.py
    OMP_NUM_THREADS=1 PYTHONPATH=/path/before python tests/old/make.py --add

The last digits depend on the processor. `--add` keeps the folders, goes on from them with the former version,
and adds what this machine comes to.
The folders are what that version wrote, but that sample grids are made small, and what no later command
reads (reports, the weights of a finished line of an experiment) is left out."""
import hashlib, json, shutil, sys, tarfile, tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sagan.checkpoints import kept_evaluator, load_run, states
from sagan.cli import sagan_train
from sagan.data import digits
from sagan.evaluation import Evaluator, train_evaluator
from sagan.experiments import run_experiment
from sagan.sharing import PretrainedSAGAN
from sagan.training import presets

here = Path(__file__).parent
sys.path.insert(0, str(here))
from pixels import NAME, Quarters

RUN = dict(preset='tiny', batch=8, z_dim=8, g_width=2, d_width=4, dtype='float32', device='cpu')
BASE = presets['tiny'].change(batch=8, z_dim=4, g_width=2, d_width=4, steps=6, dtype='float32')


def digest(tensors):
    "SHA-256 of the names and the bytes of tensors"
    h = hashlib.sha256()
    for name, t in sorted(tensors.items()): h.update(name.encode() + t.contiguous().numpy().tobytes())
    return h.hexdigest()


def summary(folder):
    "What the weights of a folder are: exactly, and as the norm of each network"
    tensors = load_file(folder/'weights.safetensors')
    def norm(net): return torch.cat([t.flatten() for k, t in tensors.items() if k.startswith(net)]).norm()
    return dict(sha256=digest(tensors), norms={net: norm(net).item() for net in ('G.', 'ema.', 'D.')})


def shrink(folder):
    "Make the pictures of a folder small"
    for file in folder.rglob('*.png'): Image.open(file).convert('L').resize((8, 8)).save(file)


def rename_form(folder, name):
    "Write a form's name of the first versions into all files of a run folder"
    config = json.loads((folder/'config.json').read_text(encoding='utf-8'))
    config['config']['form'] = name
    (folder/'config.json').write_text(json.dumps(config, indent=1), encoding='utf-8')
    file = folder/'weights.safetensors'
    with safe_open(file, 'pt') as f: header = f.metadata()
    header['config'] = json.dumps(json.loads(header['config']) | dict(form=name))
    save_file(load_file(file), file, header)
    for file in states(folder):
        state = torch.load(file, weights_only=True)
        state['config']['form'] = name
        torch.save(state, file)


class Stop(Exception): "Raised where an experiment is to stop"


def experiment(folder, stop=False):
    "Go on with the experiment of the local discriminators; `stop` ends it in its second network"
    lines = []
    def tell(text):
        lines.append(text)
        if stop and len(lines) == 5: raise Stop  # its facts, three records, and one of the second network
    evaluator = Evaluator(Quarters(), NAME)
    try: run_experiment('local', digits()[:40], BASE, folder, 1, 2, 20, evaluator, tell=tell)
    except Stop: pass


def go_on(root):
    "What the folders under `root` lead to; they are changed"
    sagan_train(resume=str(root/'run'), steps=24, device='cpu')
    log = [(r['step'], r['d_loss']) for r in load_run(root/'run').records]
    found = {'step 24': summary(root/'run'), 'log': log}
    experiment(root/'experiment')
    for file in sorted((root/'experiment').glob('*/seed*/records.json')):
        fids = [(r['step'], r['fid']) for r in json.loads(file.read_text(encoding='utf-8'))]
        weights = summary(file.parent) if (file.parent/'weights.safetensors').exists() else {}
        found[file.parent.parent.name] = weights | dict(log=fids)
    return found


def add():
    "Add what this machine's processor comes to"
    torch.set_num_threads(1)
    expected = json.loads((here/'expected.json').read_text(encoding='utf-8'))
    with tempfile.TemporaryDirectory() as tmp:
        with tarfile.open(here/'folders.tar.xz') as tar: tar.extractall(tmp, filter='data')
        expected.setdefault('elsewhere', []).append(go_on(Path(tmp)))
    (here/'expected.json').write_text(json.dumps(expected, indent=1) + '\n', encoding='utf-8')


def make(root):
    "All folders under `root`, and what they lead to"
    torch.set_num_threads(1)
    run, expected = root/'run', {}
    sagan_train(out=str(run), steps=12, keep=1, on_nan='rollback', **RUN)
    for name in ('report.html', 'attention.png', '.lock'): (run/name).unlink()
    expected['step 12'] = summary(run)
    PretrainedSAGAN.from_pretrained(run).save_pretrained(root/'shared')
    rename_form(Path(shutil.copytree(run, root/'official')), 'official')
    (root/'paper').mkdir()
    config = json.loads((run/'config.json').read_text(encoding='utf-8'))
    config['config']['form'] = 'paper'
    (root/'paper/config.json').write_text(json.dumps(config, indent=1), encoding='utf-8')

    (root/'evaluator').mkdir()
    with patch('sagan.checkpoints.train_evaluator', lambda images: train_evaluator(images, 1)):
        kept_evaluator(root/'evaluator/evaluator.pt', digits())
    saved = torch.load(root/'evaluator/evaluator.pt', weights_only=True)
    for t in saved['net'].values(): t.zero_()  # these take no room
    torch.save(saved, root/'evaluator/evaluator.pt')

    middle = root/'experiment'
    experiment(middle, stop=True)
    with tempfile.TemporaryDirectory() as tmp: expected |= go_on(shutil.copytree(root, Path(tmp)/'longer'))
    for name in ('.lock', 'local-conv/seed0/weights.safetensors'): (middle/name).unlink()
    shrink(root)
    return expected


def anonymous(entry):
    "An entry of the archive without its owner"
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ''
    return entry


if __name__ == '__main__':
    if '--add' in sys.argv: sys.exit(add())
    with tempfile.TemporaryDirectory() as tmp:
        expected = make(Path(tmp))
        expected['made with'] = [str(torch.__version__), torch.backends.cpu.get_cpu_capability()]
        (here/'expected.json').write_text(json.dumps(expected, indent=1) + '\n', encoding='utf-8')
        with tarfile.open(here/'folders.tar.xz', 'w:xz', preset=9) as tar:
            for folder in sorted(Path(tmp).iterdir()): tar.add(folder, folder.name, filter=anonymous)
    for file in ('folders.tar.xz', 'expected.json'): print(f'{(here/file).stat().st_size:,} bytes  {file}')
