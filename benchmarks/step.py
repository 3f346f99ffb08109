"""One training step against the same step as public implementations write it (plain.py).

    python benchmarks/step.py            # both sizes, all choices: about 10 minutes on two cores
    python benchmarks/step.py 32         # one size
    python benchmarks/step.py 32 128 --choices none --out FILE.json
    python benchmarks/step.py --compile --rounds 3      # rows in turn, three times: about 30 minutes

It also measures the gain of each choice of the package, in the first round, and where the time goes. Every
row of a round is a separate process; its seconds are the median of its steps. A row counts with the median
of its rounds."""
import argparse, json, platform, statistics, subprocess, sys, time, warnings
warnings.filterwarnings('ignore')
from contextlib import nullcontext
from pathlib import Path
import torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from sagan import attention, kernels, spectral, training, winograd
from sagan.config import preset
from sagan.data import Images, MemoryLoader
from sagan.losses import ttur
from sagan.devices import fastest_dtype
from sagan.precision import LossScaler
from sagan.training import d_step, ema_update, g_step, SAGAN
from plain import Plain

def config(px):
    """128 px: width 64, 1,000 classes, batch 8, attention at 32;
    32 px: G 256 and D 128 channels wide, 10 classes, batch 64, attention at 16"""
    return preset('paper').change(batch=8) if px == 128 else preset('cifar').change(form='preprint')

def sync(device):
    if device == 'cuda': torch.cuda.synchronize()

def median(f, repeats, device):
    "Median seconds of `f()`, after one to warm up"
    times = []
    for _ in range(repeats + 1):
        sync(device)
        start = time.perf_counter()
        f()
        sync(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def peaks(dtype, device):
    "GFLOP/s of a large matrix product, and of forward and backward of a large 3x3 convolution"
    a, b = [torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2)]
    product = 2*4096**3/median(lambda: a @ b, 5, device)/1e9
    def features(*shape):
        t = torch.randn(shape, device=device, dtype=dtype)
        return t.contiguous(memory_format=torch.channels_last).requires_grad_()
    x, w = features(8, 256, 64, 64), features(256, 256, 3, 3)
    def both():
        y = F.conv2d(x, w, padding=1)
        torch.autograd.grad(y, (x, w), y)
    return product, 3*2*8*64*64*9*256**2/median(both, 5, device)/1e9

# What the package does, undone one by one. Each takes (model, x) and returns x.
def nchw(m, x):
    m.to(memory_format=torch.contiguous_format)
    return x.contiguous()
def plain_convolutions(m, x):
    kernels.is_4x4_faster = lambda *_: False
    return x
def no_winograd(m, x):
    winograd.is_winograd_faster = lambda *_: False
    return x
def explicit_attention(m, x):
    attention.attend = lambda q, k, v: attention.attention_weights(q, k) @ v
    return x
def quotient_by_autograd(m, x):
    spectral.SpectralNorm.forward = lambda self, w: w/self.sigma(w)
    training.cached_spectral_norm = lambda net: nullcontext()
    return x
def gradients_for_d(m, x):
    training.frozen_weights = lambda net: nullcontext()
    return x
def two_passes(m, x):
    whole = m.D.forward
    def halves(x, y):
        if not m.D.training or len(x) <= m.cfg.batch: return whole(x, y)
        return torch.cat([whole(*t) for t in zip(x.chunk(2), y.chunk(2))])
    m.D.forward = halves
    return x
CHOICES = dict(
    channels_last=nchw, one_4x4_convolution=plain_convolutions, winograd=no_winograd,
    lean_attention=explicit_attention,
    one_quotient=quotient_by_autograd, no_gradient_for_D_in_G=gradients_for_d, one_pass_of_D=two_passes,
    fused_Adam=None, kept_memory=None)

HALF = dict(bfloat16=torch.bfloat16, float16=torch.float16)

def draw_batch(cfg, device):
    "Images, and latents and labels of three batches"
    g = torch.Generator().manual_seed(0)
    def latents():
        z = torch.randn(cfg.batch, cfg.z_dim, generator=g)
        return z.to(device), torch.randint(cfg.n_classes, (cfg.batch,), generator=g).to(device)
    x = torch.rand(cfg.batch, 3, cfg.size, cfg.size, generator=g)*2 - 1
    return x.to(device), latents(), latents(), latents()

def plain_step(cfg, model, device, x, y, fake, again):
    "The step of plain.py, whose networks must give the same output"
    plain = Plain(cfg, model, device)
    for a, b, args in (plain.G, model.G, fake), (plain.D, model.D, (x, y)):
        with torch.no_grad(): p, q = a.eval()(*args), b.eval()(*args)
        assert (p - q).abs().max() < 1e-4*q.abs().max(), 'the baseline is not the same network'
        a.train(), b.train()
    return lambda: plain.step(x, y, *fake, *again)

def plain_adam(opt):
    "One Adam launch per parameter"
    params = [p for group in opt.param_groups for p in group['params']]
    return torch.optim.Adam(params, opt.defaults['lr'], opt.defaults['betas'], foreach=False, fused=False)

def our_step(cfg, model, autocast, x, y, fake, again, without, scale):
    "The step of the package, without one of its choices, and its optimisers"
    x = x.contiguous(memory_format=torch.channels_last)
    if without != 'kept_memory' and x.device.type == 'cpu': kernels.keep_freed_memory()
    opts = ttur(model.G, model.D, cfg.lr_g, cfg.lr_d, (cfg.beta1, cfg.beta2))
    opt_g, opt_d = map(plain_adam, opts) if without == 'fused_Adam' else opts
    if CHOICES.get(without): x = CHOICES[without](model, x)
    def step():
        with autocast(): d_step(model.G, model.D, opt_d, x, y, *fake, scale=scale)
        opt_d.zero_grad()
        with autocast(): g_step(model.G, model.D, opt_g, *again, scale=scale)
        opt_g.zero_grad()
        ema_update(model.ema, model.G, cfg.ema)
    return step, opt_g, opt_d

def parts_of_a_step(cfg, model, autocast, opt_g, opt_d, device):
    "Seconds of a step's updates, of its spectral norm and of its data"
    def norm():                                                               # all that a step does for it
        with autocast():
            spectral.spectral_step(model.D)
            spectral.spectral_step(model.G)
            for net in (model.G, model.D):
                model.requires_grad_(False)
                net.requires_grad_(True)  # the other one's quotient takes no gradient
                with spectral.cached_spectral_norm(model.G), spectral.cached_spectral_norm(model.D):
                    for _, sn, _ in spectral.spectral_layers(net): sn.ready.grad = sn.ready.detach()
        model.zero_grad()
    def update():
        for p in grads: p.grad = grads[p]
        opt_d.step()
        opt_g.step()
        ema_update(model.ema, model.G, cfg.ema)
    grads = {p: torch.zeros_like(p) for net in (model.G, model.D) for p in net.parameters()}
    seconds = dict(updates=median(update, 5, device), spectral_norm=median(norm, 5, device))
    zeros = torch.zeros(4000, 3, cfg.size, cfg.size, dtype=torch.uint8)
    images = Images(zeros, torch.zeros(4000, dtype=torch.int64), [], 'zeros')
    loader = iter(MemoryLoader(images, cfg.batch, device=device))
    return seconds | dict(data=median(lambda: next(loader), 20, device))

def peak_memory(device):
    "GB of this process"
    if device == 'cuda': return torch.cuda.max_memory_allocated()/1e9
    if sys.platform != 'linux': return float('nan')
    return int(Path('/proc/self/status').read_text('utf-8').split('VmHWM:')[1].split()[0])/1e6

def measure(px, dtype, device, without, compiled, steps, peak=True, **changes):
    "One row: a dictionary of numbers; `changes` are fields of the configuration"
    # on a GPU; PyTorch's own default is TF32 in convolutions alone
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == 'tf32'
    cfg = config(px).change(**changes)
    model = SAGAN(cfg).to(device).train()
    x, (_, y), fake, again = draw_batch(cfg, device)
    row = dict(px=px, dtype=dtype, device=device, batch=cfg.batch, without=without, compiled=compiled)
    half, scale = HALF.get(dtype), LossScaler(2.**8) if dtype == 'float16' else None
    def autocast(): return torch.autocast(device, half, enabled=half is not None)
    if dtype == 'plain': step = plain_step(cfg, model, device, x, y, fake, again)
    else: step, *opts = our_step(cfg, model, autocast, x, y, fake, again, without, scale)
    if compiled:
        kernels.compile_networks(model, cuda_graphs=device == 'cuda')
        start = time.perf_counter()
        step()
        step()
        row['warm_up'] = time.perf_counter() - start
    else:
        with FlopCounterMode(display=False) as f: step()
        row['gflop'] = f.get_total_flops()/1e9
    row['seconds'] = t = median(step, steps, device)
    assert not scale or scale.good >= 2*steps, 'steps that overflowed were timed'
    if dtype != 'plain' and not without and not compiled:
        row |= {k: v/t for k, v in parts_of_a_step(cfg, model, autocast, *opts, device).items()}
    row['memory_gb'] = peak_memory(device)
    if peak and not without:
        row['peak_product'], row['peak_convolution'] = peaks(HALF.get(dtype, torch.float32), device)
    return row

def table(rows):
    "The rows as Markdown: ratios to the plain step of the same size"
    base = {r['px']: r['seconds'] for r in rows if r['dtype'] == 'plain'}
    columns = ('pixels', 'step', 'seconds', 'images/s', 'times plain', 'GFLOP', 'GFLOP/s',
               'of the convolution peak', 'spectral norm', 'optimisers, average', 'data', 'memory, GB')
    def line(cells): return f"| {' | '.join(cells)} |"
    def share(r, k): return f'{r[k]:.1%}' if k in r else ''
    lines = [line(columns), '|' + '---|'*12]
    for r in rows:
        if r['without']: continue
        t, flops = r['seconds'], ['', '', '']
        if 'gflop' in r:
            rate = r['gflop']/t
            of_peak = f"{rate/r['peak_convolution']:.0%}" if 'peak_convolution' in r else ''
            flops = [f"{r['gflop']:.0f}", f'{rate:.0f}', of_peak]
        name = r['dtype'] + ', compiled'*r['compiled']
        speed = [f'{t:.2f}', f"{r['batch']/t:.1f}", f"{base[r['px']]/t:.2f}"]
        shares = [share(r, k) for k in ('spectral_norm', 'updates', 'data')]
        lines.append(line([f"{r['px']}", name, *speed, *flops, *shares, f"{r['memory_gb']:.1f}"]))
    whole = {(r['px'], r['dtype']): r['seconds'] for r in rows if not r['without'] and not r['compiled']}
    undone = [r for r in rows if r['without']]
    if undone: lines += ['', line(['pixels', 'dtype', 'undone', 'seconds', 'times as long']), '|' + '---|'*5]
    for r in undone:
        ratio = r['seconds']/whole[r['px'], r['dtype']]
        name = r['without'].replace('_', ' ')
        lines.append(line([f"{r['px']}", r['dtype'], name, f"{r['seconds']:.2f}", f'{ratio:.2f}']))
    return '\n'.join(lines)

def plan(a):
    "(pixels, dtype, choice undone, compiled) of each row"
    fast = fastest_dtype(a.device)
    dtypes = ['plain', 'float32']
    if a.device == 'cuda': dtypes += ['tf32', 'float16']
    if fast == 'bfloat16': dtypes.append('bfloat16')
    for px in a.px:
        for dtype in dtypes: yield px, dtype, None, False
        if a.compile:
            for dtype in dict.fromkeys(('float32', fast)): yield px, dtype, None, True
        if a.choices == 'all':
            for choice in CHOICES: yield px, 'float32' if choice == 'winograd' else fast, choice, False

def run_row(job):
    "The numbers of one row, from a separate process"
    command = [sys.executable, __file__, '--row', json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(row, file=sys.stderr, flush=True)
    return row

def middle(runs):
    "The run whose seconds are the median of the rounds, with the seconds of each round"
    runs = sorted(runs, key=lambda r: r['seconds'])
    row = runs[len(runs)//2] | dict(rounds=[r['seconds'] for r in runs])
    # later rounds find what the first one compiled
    if 'warm_up' in row: row['warm_up'] = max(r['warm_up'] for r in runs)
    return row

def machine(device):
    "Its name"
    if device == 'cuda': return torch.cuda.get_device_name()
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}
    return f"{torch.get_num_threads()} threads, {capabilities.get('cpu_name', platform.processor())}"

if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('px', type=int, nargs='*', default=[32, 128])
    p.add_argument('--choices', default='all', choices=['all', 'none'])
    p.add_argument('--out')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--compile', action='store_true')
    p.add_argument('--steps', type=int, default=3)
    p.add_argument('--rounds', type=int, default=1)
    p.add_argument('--row')
    a = p.parse_args()
    if a.row:
        print(json.dumps(measure(**json.loads(a.row))))
        sys.exit()
    jobs = [dict(px=px, dtype=dtype, device=a.device, without=without, compiled=compiled, steps=a.steps)
            for px, dtype, without, compiled in plan(a)]
    runs = [[] for _ in jobs]
    for i in range(a.rounds):
        for job, done in zip(jobs, runs):
            if i == 0 or not job['without']: done.append(run_row(job))
    rows = [middle(done) for done in runs]
    about = dict(machine=machine(a.device), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    if a.out: Path(a.out).write_text(json.dumps(dict(about, rows=rows), indent=1), encoding='utf-8')
    print(f"{about['machine']}, PyTorch {about['torch']}, {about['date']}\n\n{table(rows)}")
