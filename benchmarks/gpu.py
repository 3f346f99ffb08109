"""Everything that needs a GPU, for a machine that is there for ten minutes.

    python benchmarks/gpu.py --out OUT --minutes 10   # on a GPU
    python benchmarks/gpu.py --out OUT --data FOLDER  # and trains on a folder with what time is left
    python benchmarks/gpu.py --out OUT --tiny         # the same code on a CPU, in a minute

The parts: a training step in every dtype, attention, loading, a resumed run, all cells of the pages and all
tests that need a GPU, and a training of the preset `cifar` with `n_d=1`, in which D takes one step for each
of G in place of the preset's five.
It leaves OUT/gpu.json and OUT/gpu.md, both written again after every part: a machine that is taken
away leaves what was measured. A part that fails is noted with its error, and the next one runs.
The page on speed and scale shows what is in nbs/benchmarks/gpu.md."""
import argparse, json, re, subprocess, sys, time, traceback, warnings
warnings.filterwarnings('ignore')
from functools import partial
from pathlib import Path
import torch, torch.nn.functional as F
from sagan.attention import attend
from sagan.data import Images, MemoryLoader
from sagan.devices import fastest_dtype
from sagan.kernels import fused_attention
from sagan.runs import attend_run, resume_run, sample_run, train_run
from step import machine, median, table

root = Path(__file__).resolve().parent.parent
TITLES = dict(
    step='A training step', attention='Attention, both passes, bfloat16, batch of 4',
    loading='Images that reach the GPU', resumed='A run that is stopped halfway and resumed',
    pages='Cells of the pages, and tests, that need a GPU',
    photographs='A training of preset `cifar` at full width, with `n_d=1` in place of its 5')
# Fields of small networks, for a CPU
TINY = dict(g_width=2, d_width=4)

def find_cuda_pages():
    "Pages with cells that run on a GPU only, and the number of these cells"
    pages = sorted([*(root/'nbs').glob('*.ipynb'), *(root/'nbs'/'library').glob('*.ipynb')])
    counts = {p: p.read_text(encoding='utf-8').count('"#| cuda') for p in pages}
    return {p: n for p, n in counts.items() if n}

def find_gpu_tests():
    "Files with tests that run on a GPU only"
    files = sorted((root/'tests').glob('test_*.py'))
    return [f for f in files if '@pytest.mark.gpu' in f.read_text(encoding='utf-8')]

def call(command, left):
    "(error or '', output) of a process that may take as long as is left"
    command = list(map(str, command))
    try: done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=max(.1, left()))
    except subprocess.TimeoutExpired as e: return f'stopped after {e.timeout:.1f} s', ''
    return f'{done.stderr}{done.stdout}'.strip()[-300:] if done.returncode else '', done.stdout

def run_pages(device, tiny, left):
    "Are the pages with `#| cuda` cells right on this machine? And the tests that need a GPU?"
    pages = {root/'nbs'/'library'/'56_pace.ipynb': 0} if tiny else find_cuda_pages()
    flags = ['--flags', 'cuda'] if device == 'cuda' else []
    rows = []
    for page, cells in pages.items():
        error, _ = call([Path(sys.executable).parent/'nbdev-test', page, *flags], left)
        rows.append({'file': page.name, 'cells for a GPU': cells, 'result': error or 'passed'})
    for file in find_gpu_tests():
        command = sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'gpu', file
        error, said = call(command, left)
        counts = re.findall(r'\d+ (?:passed|failed|skipped|error)', said)
        rows.append({'file': file.name, 'result': error or ', '.join(counts)})
    return rows

def plan_steps(device, tiny):
    "(pixels, batch, dtype, compiled) of each row: the smaller size first, what has to compile last"
    gpu = device == 'cuda'
    jobs = [('plain', False), ('float32', False)]
    if gpu: jobs += [('tf32', False), ('bfloat16', False), ('float16', False)]
    if not tiny: jobs += [('bfloat16', True), ('tf32' if gpu else 'float32', True)]
    sizes = ((32, 4),) if tiny else ((32, 64), (128, 256))
    rows = [(px, batch, *job) for px, batch in sizes for job in jobs]
    return sorted(rows, key=lambda row: row[-1])

def time_steps(device, tiny, left):
    "One training step of each kind against the plain one, each in a process of its own"
    rows = []
    for px, batch, dtype, compiled in plan_steps(device, tiny):
        job = dict(px=px, dtype=dtype, device=device, without=None, compiled=compiled, batch=batch)
        more = TINY | dict(steps=1, peak=False) if tiny else dict(steps=5)
        error, said = 'no time was left', ''
        if left() > 0:
            command = sys.executable, root/'benchmarks'/'step.py', '--row', json.dumps(job | more)
            error, said = call(command, left)
        rows.append(job | dict(failed=error) if error else json.loads(said.splitlines()[-1]))
    return sorted(rows, key=lambda row: row['px'])

def forward_and_backward(f, qkv):
    "Both passes"
    o = f(*qkv)
    torch.autograd.grad(o, qkv, o)

def direct(q, k, v):
    "PyTorch's call, with one head: its fused kernels for a GPU take (B, heads, N, D) only"
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.)[:, 0]

def measure_attention(device, tiny):
    "Milliseconds and peak memory of our call, and of PyTorch's called directly"
    calls = dict(ours=attend, direct=direct)
    if device == 'cpu': calls['ours on a GPU'] = fused_attention  # a CPU takes blocks instead
    rows, width = [], 1 if tiny else 16
    for positions in (64, 1472) if tiny else (4096, 16_384):  # from 1,449 on, no map of four images is stored
        g = torch.Generator(device).manual_seed(0)
        sizes = (positions, width), (positions, width), (positions, 8*width)
        qkv = [torch.randn(4, *s, generator=g, device=device).bfloat16().requires_grad_() for s in sizes]
        for name, f in calls.items():
            run = partial(forward_and_backward, f, qkv)
            seconds = median(run, 1 if tiny else 5, device)
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
    steps = 2 if tiny else 200
    rows = []
    for dtype in ('float32',) if tiny else dict.fromkeys(('float32', fastest_dtype(device))):
        options = dict(preset='small', dtype=dtype, device=device, tell=lambda text: None)
        if tiny: options |= TINY | dict(batch=4)
        whole = train_run(out=out/f'whole-{dtype}', steps=steps, **options)
        train_run(out=out/f'half-{dtype}', steps=steps//2, **options)
        half = resume_run(out/f'half-{dtype}', steps=steps, device=device, tell=lambda text: None)
        pairs = zip(whole.model.state_dict().values(), half.model.state_dict().values())
        largest = max((a.float() - b.float()).abs().max().item() for a, b in pairs)
        rows.append(dict(dtype=dtype, steps=steps, largest_difference=largest))
    return rows

def train_photographs(out, device, data, tiny, left):
    "The preset `cifar` (form `released`) on a folder, one step of D for each of G, until a minute is left"
    if tiny: options = TINY | dict(batch=4, steps=1)
    else: options = dict(minutes=left()/60 - 1, measure_every=2000, samples=5000, dtype='bfloat16')
    if not tiny and (not data or options['minutes'] <= 0): return []
    run = train_run(data or 'digits', out/'photographs', 'cifar', n_d=1, device=device, **options)
    sample_run(run)
    attend_run(run)
    measured = [r for r in run.records if r.get('fid') is not None] or run.records[-1:]
    return [dict(step=r['step'], images=r['step']*run.cfg.batch, seconds=r['seconds'], fid=r.get('fid'))
            for r in measured]

def as_table(rows):
    "Rows of any kind as a Markdown table"
    names = list(dict.fromkeys(k for r in rows for k in r))
    def cell(v): return f'{v:.4g}' if isinstance(v, float) else '' if v is None else str(v).replace('\n', ' ')
    head = [n.replace('_', ' ') for n in names]
    lines = [head, ['---']*len(names), *([cell(r.get(k)) for k in names] for r in rows)]
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)

def as_text(name, part):
    "A part of the results as Markdown: steps against the plain one of their size, then all other rows"
    rows = part['rows']
    timed = [r for r in rows if name == 'step' and 'failed' not in r]
    sizes = {r['px'] for r in timed if r['dtype'] == 'plain'}
    compared = [r for r in timed if r['px'] in sizes]
    others = [r for r in rows if r not in compared]
    shown = [table(compared)]*bool(compared) + [as_table(others)]*bool(others)
    if not rows: shown.append(part.get('error', 'Not measured.'))
    return '\n\n'.join([f'### {TITLES[name]}', *shown, f"Time: {part['seconds']:.0f} s."])

def write(out, results):
    "gpu.json and gpu.md"
    text = ['**{machine}, PyTorch {torch}, {date}, commit {commit}**'.format_map(results)]
    text += [as_text(name, part) for name, part in results['parts'].items()]
    (out/'gpu.json').write_text(json.dumps(results, indent=1), encoding='utf-8')
    (out/'gpu.md').write_text('\n\n'.join(text) + '\n', encoding='utf-8')

def find_commit():
    "The commit of this clone, None outside of one"
    error, said = call(['git', 'rev-parse', '--short', 'HEAD'], lambda: 10)
    return None if error else said.strip()

def main(args=None):
    "Measure every part, and write after each; exits with an error if one failed"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder for the results')
    p.add_argument('--data', help='folder of images to train on with the time that is left')
    p.add_argument('--minutes', type=float, default=10, help='how long the machine is there')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--tiny', action='store_true', help='small sizes, to try the program')
    a = p.parse_args(args)
    if a.device == 'cpu' and not a.tiny: p.error('there is no GPU here; --tiny tries the program on the CPU')
    end = time.monotonic() + 60*a.minutes
    def left(): return end - time.monotonic()
    def half(): return left() - 30*a.minutes  # steps may take half of the time
    a.out.mkdir(parents=True, exist_ok=True)
    parts = dict(
        step=lambda: time_steps(a.device, a.tiny, half),
        attention=lambda: measure_attention(a.device, a.tiny),
        loading=lambda: measure_loading(a.device, a.tiny),
        resumed=lambda: compare_resumed(a.out, a.device, a.tiny),
        pages=lambda: run_pages(a.device, a.tiny, left),
        photographs=lambda: train_photographs(a.out, a.device, a.data, a.tiny, left))
    results = dict(machine=machine(a.device), torch=torch.__version__, date=time.strftime('%Y-%m-%d'),
                   commit=find_commit(), tiny=a.tiny, parts={})
    for name, part in parts.items():
        began, done = time.monotonic(), dict(rows=[])
        try: done['rows'] = part()
        except Exception as e:
            traceback.print_exc()
            done['error'] = f'{type(e).__name__}: {e}'
        results['parts'][name] = done | dict(seconds=time.monotonic() - began)
        write(a.out, results)
        print(f"{name}: {results['parts'][name]['seconds']:.0f} s, {len(done['rows'])} rows", flush=True)
    failed = [n for n, p in results['parts'].items() if 'error' in p]
    if failed: raise SystemExit(f"failed: {', '.join(failed)}")

if __name__ == '__main__': main()
