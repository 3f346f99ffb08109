"""Everything that needs a GPU, for a machine that is there for ten minutes.

    python benchmarks/gpu.py --out OUT --minutes 10   # on a GPU
    python benchmarks/gpu.py --out OUT --data FOLDER  # and trains on a folder with what time is left
    python benchmarks/gpu.py --out OUT --tiny         # the same code on a CPU, in a minute

It leaves OUT/gpu.json and OUT/gpu.md, both written again after every part: a machine that is taken
away leaves what was measured. A part that fails is noted with its error, and the next one runs."""
import argparse, json, subprocess, sys, time, traceback, warnings
warnings.filterwarnings('ignore')
from functools import partial
from pathlib import Path
import torch, torch.nn.functional as F
from sagan.attention import attend
from sagan.data import Images, MemoryLoader
from sagan.devices import fastest_dtype
from sagan.runs import attend_run, resume_run, sample_run, train_run
from step import machine, median, table

root = Path(__file__).resolve().parent.parent
# Fields of small networks, for a CPU
TINY = dict(g_width=2, d_width=4, batch=4)

def find_cuda_pages():
    "Pages with cells that run on a GPU only"
    pages = [*(root/'nbs').glob('*.ipynb'), *(root/'nbs'/'library').glob('*.ipynb')]
    return sorted(p for p in pages if '"#| cuda' in p.read_text(encoding='utf-8'))

def run_pages(device, tiny):
    "Are the pages with `#| cuda` cells right on this machine?"
    pages = [root/'nbs'/'library'/'56_pace.ipynb'] if tiny else find_cuda_pages()
    rows = []
    for page in pages:
        flags = ['--flags', 'cuda'] if device == 'cuda' else []
        command = [Path(sys.executable).parent/'nbdev-test', page, *flags]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        rows.append(dict(page=page.name, passed=done.returncode == 0, said=done.stdout[-300:].strip()))
    return rows

def time_steps(device, tiny, left):
    "One training step of each kind against the plain one, each in a process of its own"
    dtypes = ['plain', 'float32', *(['tf32', 'bfloat16', 'float16'] if device == 'cuda' else [])]
    rows = []
    for px, batch in ((32, 64),) if tiny else ((32, 64), (128, 256)):
        jobs = [(d, False) for d in dtypes] + ([] if tiny else [(d, True) for d in ('tf32', 'bfloat16')])
        for dtype, compiled in jobs:
            if left() < 60: return rows
            job = dict(px=px, dtype=dtype, device=device, without=None, compiled=compiled)
            job |= dict(steps=1 if tiny else 5)
            job |= TINY | dict(peak=False) if tiny else dict(batch=batch)
            command = [sys.executable, root/'benchmarks'/'step.py', '--row', json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode: rows.append(dict(px=px, dtype=dtype, failed=done.stderr.strip()[-300:]))
            else: rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows

def forward_and_backward(f, qkv):
    "Both passes"
    o = f(*qkv)
    torch.autograd.grad(o, qkv, o)

def measure_attention(device, tiny):
    "Milliseconds and peak memory of our call, and of PyTorch's called directly"
    calls = dict(ours=attend, direct=partial(F.scaled_dot_product_attention, scale=1.))
    rows = []
    for positions in (64, 256) if tiny else (4096, 16_384):
        g = torch.Generator(device).manual_seed(0)
        sizes = (positions, 16), (positions, 16), (positions, 128)
        qkv = [torch.randn(4, *s, generator=g, device=device).bfloat16().requires_grad_() for s in sizes]
        for name, f in calls.items():
            run = partial(forward_and_backward, f, qkv)
            seconds = median(run, 5, device)
            row = dict(positions=positions, call=name, ms=1e3*seconds)
            if device == 'cuda':
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run()
                row['mb'] = (torch.cuda.max_memory_allocated() - before)/1e6
            rows.append(row)
    return rows

def measure_loading(device, tiny):
    "Images per second that reach the device, from the memory of the machine and from its own"
    n, px, batch = (400, 32, 16) if tiny else (20_000, 128, 256)
    x = torch.randint(0, 256, (n, 3, px, px), dtype=torch.uint8)
    images = Images(x, torch.zeros(n, dtype=torch.int64), [], 'random')
    rows = []
    for place, held in dict(host=images, device=images.to(device)).items():
        batches = iter(MemoryLoader(held, batch, 10**6, device=device))
        rows.append(dict(images_in=place, per_second=batch/median(lambda: next(batches), 50, device)))
    return rows

def compare_resumed(out, device, tiny):
    "Largest difference of weights between a run that was stopped halfway and one that was not"
    steps = 4 if tiny else 200
    rows = []
    for dtype in ('float32', fastest_dtype(device)):
        options = dict(preset='small', dtype=dtype, device=device, tell=lambda text: None)
        if tiny: options |= TINY
        whole = train_run(out=out/f'whole-{dtype}', steps=steps, **options)
        train_run(out=out/f'half-{dtype}', steps=steps//2, **options)
        half = resume_run(out/f'half-{dtype}', steps=steps, device=device, tell=lambda text: None)
        pairs = zip(whole.model.state_dict().values(), half.model.state_dict().values())
        largest = max((a.float() - b.float()).abs().max().item() for a, b in pairs)
        rows.append(dict(dtype=dtype, steps=steps, largest_difference=largest))
        if fastest_dtype(device) == 'float32': break
    return rows

def train_photographs(out, device, data, tiny, left):
    "The published networks at full width on a folder, for the time that is left"
    if not data: return []
    minutes = .02 if tiny else max(.5, left()/60 - 1)
    options = TINY if tiny else dict(dtype='bfloat16', measure_every=2000, samples=5000)
    run = train_run(data, out/'photographs', 'cifar', minutes=minutes, n_d=1, device=device, **options)
    sample_run(run)
    attend_run(run)
    measured = [r for r in run.records if r.get('fid') is not None]
    return [dict(step=r['step'], images=r['step']*run.cfg.batch, fid=r['fid']) for r in measured]

def as_table(rows):
    "Rows of any kind as a Markdown table"
    names = list(dict.fromkeys(k for r in rows for k in r))
    def cell(v): return f'{v:.4g}' if isinstance(v, float) else '' if v is None else str(v).replace('\n', ' ')
    lines = [names, ['---']*len(names), *([cell(r.get(k)) for k in names] for r in rows)]
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)

def write(out, results):
    "gpu.json and gpu.md"
    (out/'gpu.json').write_text(json.dumps(results, indent=1), encoding='utf-8')
    text = [f"# {results['machine']}, PyTorch {results['torch']}"]
    for name, part in results['parts'].items():
        rows = part['rows']
        timed = name == 'step' and rows and not any('failed' in r for r in rows)
        shown = table(rows) if timed else as_table(rows) if rows else 'not measured'
        text.append(f"## {name}\n\n{part.get('error', '')}{shown}\n\n{part['seconds']:.0f} s")
    (out/'gpu.md').write_text('\n\n'.join(text) + '\n', encoding='utf-8')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder for the results')
    p.add_argument('--data', help='folder of images to train on with the time that is left')
    p.add_argument('--minutes', type=float, default=10, help='how long the machine is there')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--tiny', action='store_true', help='small sizes, to try the program')
    a = p.parse_args()
    if a.device == 'cpu' and not a.tiny: p.error('there is no GPU here; --tiny tries the program on the CPU')
    start = time.monotonic()
    def left(): return 60*a.minutes - (time.monotonic() - start)
    a.out.mkdir(parents=True, exist_ok=True)
    parts = dict(
        step=lambda: time_steps(a.device, a.tiny, left),
        attention=lambda: measure_attention(a.device, a.tiny),
        loading=lambda: measure_loading(a.device, a.tiny),
        resumed=lambda: compare_resumed(a.out, a.device, a.tiny),
        pages=lambda: run_pages(a.device, a.tiny),
        photographs=lambda: train_photographs(a.out, a.device, a.data, a.tiny, left))
    results = dict(machine=machine(a.device), torch=torch.__version__, tiny=a.tiny, parts={})
    for name, part in parts.items():
        began, done = time.monotonic(), dict(rows=[])
        try: done['rows'] = part()
        except Exception as e:
            traceback.print_exc()
            done['error'] = f'{type(e).__name__}: {e}\n\n'
        results['parts'][name] = done | dict(seconds=time.monotonic() - began)
        write(a.out, results)
        print(f"{name}: {results['parts'][name]['seconds']:.0f} s, {len(done['rows'])} rows", flush=True)
    failed = [n for n, p in results['parts'].items() if 'error' in p]
    if failed: raise SystemExit(f"failed: {', '.join(failed)}")
