"""The trainings behind the preset `photos`, all measured by one small classifier of all the images.

    python tools/photographs.py FOLDER                 # what is missing; FOLDER has a subfolder per class
    python tools/photographs.py FOLDER --only few      # one part
    python tools/photographs.py --show                 # the stored records

Ours are on the 50,000 training images of CIFAR-10. Every training runs on one thread, and two at a time. A
training that was stopped goes on. The page is nbs/library/60_photographs.ipynb."""
import argparse
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

warnings.filterwarnings('ignore', category=FutureWarning)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
import torch
from plain import Plain, names
from sagan.attention import attention_maps
from sagan.checkpoints import read_config
from sagan.config import Config, few_images, presets
from sagan.data import Images, MemoryLoader, load_images
from sagan.measuring import load_or_train_evaluator, measure_generator, read_records
from sagan.nearest import nearest_images, real_distances
from sagan.networks import generate_batches
from sagan.references import reference
from sagan.runner import Plan, train_variant
from sagan.runs import load_run, shipped
from sagan.sampling import truncated_generator
from sagan.storage import write_json
from sagan.training import SAGAN, draw_inputs, ema_update
from sagan.visualization import attention_figure

stored = Path(__file__).resolve().parent.parent/'nbs'/'experiments'/'photographs'
SAMPLES = 5000
photos = presets['photos']
FIRST = dict(lr_d=4e-4, ema=.999)  # of the preset's first version
AUGMENT = FIRST | dict(diffaug='color,translation,cutout')
SMALL = asdict(presets['small']) | dict(data=photos.data, flip=True)
PYRAMID = dict(g_width=(192, 128, 64, 32), d_width=(32, 64, 128, 128))
# Part: {row: (images, how many, changes of `photos`)}, seeds, images seen in all, and between measurements
PARTS = {
    'few': ({f'{n}-{name}': ('all', n, changes) for n in (500, 2000, 10_000)
             for name, changes in (('plain', FIRST), ('augmented', AUGMENT))}, 1, 192_000, 64_000),
    # The same by the preset as it is
    'number': ({f'{n}-{name}': ('all', n, changes) for n in (500, 2000, 10_000)
                for name, changes in (('plain', {}), ('augmented', few_images))}, 2, 128_000, 64_000),
    'one': ({'1-to-1': ('horse', 500, AUGMENT),
             '5-to-1': ('horse', 500, AUGMENT | dict(n_d=5))}, 2, 96_000, 32_000),
    # The same for an hour on one core, by the preset
    'hour': ({'photos': ('horse', 500, few_images),
              'long average': ('horse', 500, few_images | dict(ema=.999)),
              'small': ('horse', 500, SMALL | dict(steps=19_800))}, 2, 192_000, 32_000),
    # plain.py has the attention of equations 1-3. Half the widths of `photos`, for the time it takes
    'step': ({name: ('all', 50_000, dict(form='preprint', g_width=8, d_width=16))
              for name in ('ours', 'theirs')}, 3, 64_000, 32_000),
    # A step of `photos` takes as long as 3.3 of `small`, what a folder was trained by before
    'time': ({'photos': ('all', 50_000, {}), 'first version': ('all', 50_000, FIRST),
              'small': ('all', 50_000, SMALL | dict(steps=19_800))}, 2, 192_000, 64_000),
    'choice': ({'wider batch': ('all', 50_000, dict(batch=64)),
                'pyramid': ('all', 50_000, PYRAMID)}, 1, 96_000, 32_000)}


def choose_rows(images: Images, kind: str, n: int) -> torch.Tensor:
    "Numbers of the first n images: as many of each class, or those of one class"
    classes = range(len(images.classes)) if kind == 'all' else [images.classes.index(kind)]
    return torch.cat([(images.y == c).nonzero().squeeze(1)[:n//len(classes)] for c in classes])


def choose_images(images: Images, kind: str, n: int) -> Images:
    "The first n images; of one class, without a label"
    chosen = images[choose_rows(images, kind, n)]
    return chosen if kind == 'all' else replace(chosen, y=torch.zeros_like(chosen.y), classes=[])


def load_folder(folder: Path) -> Images:
    "All images, 32 pixels"
    return replace(load_images(str(folder), 32), name=folder.name)


def make_plan(folder: Path, out: Path, kind: str, n: int, every: int) -> Plan:
    "What to train on, and how to measure: against all images of the kind, whatever the number to train on"
    images = load_folder(folder)
    evaluator = load_or_train_evaluator(out/'evaluator.pt', images)
    real = reference(images if kind == 'all' else choose_images(images, kind, 5000), evaluator)
    return Plan(every, SAMPLES, evaluator, real, choose_images(images, kind, n), 'cpu')


def row_steps(part: str, row: str) -> int:
    "The steps of a row: its own number, or those that show the images of its part"
    rows, _, seen, _ = PARTS[part]
    changes = rows[row][2]
    return changes.get('steps', seen//photos.change(**changes).batch)


def train_theirs(cfg: Config, plan: Plan) -> list[dict]:
    "The records of the plain step of benchmarks/plain.py from the same weights, on the same batches"
    model, records, start = SAGAN(cfg), [], perf_counter()
    plain, rng = Plain(cfg, model), torch.Generator().manual_seed(cfg.seed)
    average = deepcopy(plain.G)  # like ours, with batch norm's averages and from `ema_start` on
    loader = MemoryLoader(plan.images, cfg.batch, cfg.steps, cfg.flip, cfg.seed)
    for step, (x, y) in enumerate(loader, 1):
        plain.step(x, y, *draw_inputs(y, cfg, rng), *draw_inputs(y, cfg, rng))
        ema_update(average, plain.G, cfg.ema if step > cfg.ema_start else 0.)
        if step % plan.every: continue
        load_plain(model.ema, average, plain.G)
        records.append(dict(step=step, seconds=perf_counter() - start, diverged=False)
                       | measure_generator(model.ema, plan.images, plan.evaluator, plan.real, plan.samples))
        print(f"theirs, seed {cfg.seed}, step {step}: FID {records[-1]['fid']:.3f}", flush=True)
    return records


def load_plain(G, average, latest):
    "The averaged weights of a plain generator in ours, with the latest vectors of its spectral norm"
    vectors = {k: v for k, v in latest.state_dict().items() if k.endswith(('weight_u', 'weight_v'))}
    state = average.state_dict() | vectors
    ours = G.state_dict()
    G.load_state_dict(dict(zip(ours, [state[k] for k in names(ours)])))


def train_row(folder: Path, out: Path, part: str, row: str, seed: int):
    "One training, and its records among the stored ones"
    rows, _, seen, every = PARTS[part]
    kind, n, changes = rows[row]
    cfg = photos.change(**changes | dict(steps=row_steps(part, row)))
    plan = make_plan(folder, out, kind, n, cfg.steps*every//seen)
    cfg = cfg.change(seed=seed, n_classes=len(plan.images.classes))
    at = out/part/row/f'seed{seed}'
    if (at/'config.json').exists() and read_config(at)[0] != cfg:
        raise ValueError(f'{at} holds a training with other settings; move it away')
    kept = stored/part/row/f'seed{seed}'
    kept.mkdir(parents=True, exist_ok=True)
    if row == 'theirs':
        write_json(kept/'records.json', train_theirs(cfg, plan))
        return
    records = []
    for r in train_variant(at, cfg, plan):
        print(f"{part}, {row}, seed {seed}, step {r['step']}: FID {r['fid']:.3f}  recall {r['recall']:.2f}",
              flush=True)
        records.append(r)
        write_json(kept/'records.json', records)
    G = load_run(at).model.ema
    if kind != 'all': save_attention(G, kept/'attention.png')
    if n <= 10_000:
        near = count_near(G, load_folder(folder), kind, n, plan.evaluator)
        write_json(kept/'near.json', near)
        print(near)
    shutil.copy(sorted((at/'samples').glob('*.png'))[-1], kept/'samples.png')


def count_near(G, images: Images, kind: str, n: int, evaluator, samples: int = 1000) -> dict:
    """How many samples are nearer to an image that G was trained on than to any other of the kind

    `by_chance` and `spread` are the mean and the standard deviation over as many images, drawn at random."""
    known, trained = choose_rows(images, kind, len(images)), choose_rows(images, kind, n)
    y = torch.arange(samples) % len(images.classes) if kind == 'all' else None
    x = torch.cat(list(generate_batches(G, y, samples, 0)))     # (samples, 3, 32, 32)
    numbers, _ = nearest_images(x, images[known], evaluator, 1)
    found = torch.bincount(numbers[:, 0], minlength=len(known)) # of each real image
    rng = torch.Generator().manual_seed(0)
    drawn = [found[torch.randperm(len(known), generator=rng)[:len(trained)]].sum() for _ in range(1000)]
    return dict(near=found[torch.isin(known, trained)].sum().item(), samples=samples,
                by_chance=samples*len(trained)/len(known), spread=torch.stack(drawn).double().std().item())


def save_attention(G, file: Path):
    "Where three generated images look"
    torch.manual_seed(0)
    x, maps = attention_maps(G, torch.randn(3, G.z_dim))
    attention_figure(x, maps[-1]).savefig(file)


def measure_shipped(folder: Path, out: Path):
    "The packaged model by the classifier of this machine, to compare with the one that the page has used"
    plan = make_plan(folder, out, 'all', 50_000, 1)
    G = load_run(shipped('photographs')).model.ema
    scores = measure_generator(G, plan.images, plan.evaluator, plan.real, plan.samples)
    x = torch.cat(list(generate_batches(G, torch.arange(1000) % 10, seed=0)))  # (1000, 3, 32, 32)
    _, distance = nearest_images(x, plan.images, plan.evaluator, 1)
    usual = real_distances(plan.images, 1000, plan.evaluator)
    scores |= dict(nearest=distance.min().item(), nearest_median=distance.median().item(),
                   nearest_median_of_real=usual.median().item())
    write_json(stored/'model'/'scores-again.json', scores)
    def truncated(t): return measure_generator(
        truncated_generator(G, t) if t else G, plan.images, plan.evaluator, plan.real, 2000)
    write_json(stored/'model'/'truncation.json', {str(t): truncated(t) for t in (None, 1., .5, .25)})
    print(f"FID {scores['fid']:.3f}  recall {scores['recall']:.2f}  {scores['evaluator']}")


def show():
    "The last FID of every row and seed"
    for part, (rows, seeds, *_) in PARTS.items():
        for row in rows:
            files = [stored/part/row/f'seed{seed}'/'records.json' for seed in range(seeds)]
            last = [read_records(f)[-1] for f in files if f.exists()]
            print(f'{part:8}{row:18}', *(f"{r['fid']:8.3f} (step {r['step']})" for r in last))


def run_part(folder: Path, out: Path, part: str, jobs: int):
    "All rows and seeds of a part that are not stored to the last step, each in a process of its own"
    rows, seeds, *_ = PARTS[part]
    make_plan(folder, out, 'all', 50_000, 1)  # the evaluator, before two processes want it
    def last_step(row, seed):
        file = stored/part/row/f'seed{seed}'/'records.json'
        return read_records(file)[-1]['step'] if file.exists() else 0
    todo = [(row, seed) for seed in range(seeds) for row in rows
            if last_step(row, seed) < row_steps(part, row)]
    def start(pair):
        row, seed = pair
        one = '--only', part, '--row', row, '--seed', str(seed)
        subprocess.run([sys.executable, __file__, folder, '--out', out, *one], check=True)
    with ThreadPoolExecutor(jobs) as pool: list(pool.map(start, todo))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, nargs='?', help='CIFAR-10, or other images in folders')
    p.add_argument('--shipped', action='store_true', help='measure the packaged model only')
    p.add_argument('--show', action='store_true', help='print the stored scores')
    p.add_argument('--only', nargs='*', choices=PARTS, default=list(PARTS), help='parts to train')
    p.add_argument('--row', help='one row of one part')
    p.add_argument('--seed', type=int, default=0, help='with --row: its seed')
    p.add_argument('--jobs', type=int, default=2, help='trainings at a time')
    p.add_argument('--out', type=Path, default=Path('runs')/'photographs', help='folder of the runs')
    args = p.parse_args()
    if args.show: show()
    elif args.shipped: measure_shipped(args.folder, args.out)
    elif args.row: train_row(args.folder, args.out, args.only[0], args.row, args.seed)
    else:
        for part in args.only: run_part(args.folder, args.out, part, args.jobs)
