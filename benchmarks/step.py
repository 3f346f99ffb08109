"""One training step against the same step as public implementations write it (plain.py), what each choice gives, and where the time goes.

    python benchmarks/step.py            # both sizes, all choices: about 10 minutes on two cores
    python benchmarks/step.py 32         # one size
    python benchmarks/step.py 32 128 --choices none --out FILE.json

Every row is a process of its own; seconds are the median of its steps."""
import argparse, json, platform, statistics, subprocess, sys, time, warnings
warnings.filterwarnings('ignore')
from contextlib import nullcontext
from pathlib import Path
import torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
import sagan.attention as attention, sagan.kernels as kernels, sagan.spectral as spectral, sagan.training as training
from sagan.data import Images, MemoryLoader
from sagan.losses import ttur
from sagan.config import preset
from sagan.precision import fastest_dtype, LossScaler
from sagan.training import d_step, ema_update, g_step, SAGAN
from plain import Plain

def config(px):
    "128 px: width 64, 1,000 classes, batch 8, attention at 32; 32 px: G 256 and D 128 channels wide, 10 classes, batch 64, attention at 16"
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
    x, w = [torch.randn(s, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for s in ((8, 256, 64, 64), (256, 256, 3, 3))]
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
def explicit_attention(m, x):
    attention.attend = lambda q, k, v: attention.attention_weights(q, k) @ v
    return x
def quotient_by_autograd(m, x):
    spectral.SpectralNorm.forward = lambda self, w: w/self.sigma(w)
    training.normalised = lambda net: nullcontext()
    return x
def gradients_for_d(m, x):
    m.D.requires_grad_ = lambda *_: m.D
    return x
def two_passes(m, x):
    whole = m.D.forward
    def halves(x, y):
        return torch.cat([whole(*t) for t in zip(x.chunk(2), y.chunk(2))]) if m.D.training and len(x) > m.cfg.batch else whole(x, y)
    m.D.forward = halves
    return x
CHOICES = dict(channels_last=nchw, one_4x4_convolution=plain_convolutions, fused_attention=explicit_attention, one_quotient=quotient_by_autograd,
               no_gradient_for_D_in_G=gradients_for_d, one_pass_of_D=two_passes, fused_Adam=None, kept_memory=None)

HALF = dict(bfloat16=torch.bfloat16, float16=torch.float16)

def measure(px, dtype, device, without, compiled, steps):
    "One row: a dictionary of numbers"
    cfg, g = config(px), torch.Generator().manual_seed(0)
    # on a GPU; PyTorch's own default is TF32 in convolutions alone
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == 'tf32'
    model = SAGAN(cfg).to(device)
    model.train()
    def latents():
        return torch.randn(cfg.batch, cfg.z_dim, generator=g).to(device), torch.randint(cfg.n_classes, (cfg.batch,), generator=g).to(device)
    x, (_, y), (z, yf), (z2, y2) = (torch.rand(cfg.batch, 3, px, px, generator=g)*2 - 1).to(device), latents(), latents(), latents()
    row = dict(px=px, dtype=dtype, device=device, batch=cfg.batch, without=without, compiled=compiled)
    if dtype == 'plain':
        plain = Plain(cfg, model, device)
        # the same networks: the same output
        for a, b, args in (plain.G, model.G, (z, yf)), (plain.D, model.D, (x, y)):
            with torch.no_grad(): p, q = a.eval()(*args), b.eval()(*args)
            assert (p - q).abs().max() < 1e-4*q.abs().max(), 'the baseline is not the same network'
            a.train(), b.train()
        def step(): plain.step(x, y, z, yf, z2, y2)
    else:
        x = x.contiguous(memory_format=torch.channels_last)
        if without != 'kept_memory' and device == 'cpu': training.keep_freed_memory()
        opt_g, opt_d = ttur(model.G, model.D, cfg.lr_g, cfg.lr_d, (cfg.beta1, cfg.beta2))
        if without == 'fused_Adam':
            opt_g, opt_d = [torch.optim.Adam(o.param_groups[0]['params'] + o.param_groups[1]['params'], o.defaults['lr'], o.defaults['betas'], foreach=False, fused=False) for o in (opt_g, opt_d)]
        elif without not in (None, 'kept_memory'): x = CHOICES[without](model, x)
        if compiled: training.compile_networks(model)
        half, scale = HALF.get(dtype), LossScaler(2.**8) if dtype == 'float16' else None
        def autocast(): return torch.autocast(device, half, enabled=half is not None)
        def step():
            with autocast(): d_step(model.G, model.D, opt_d, x, y, z, yf, scale=scale)
            with autocast(): g_step(model.G, model.D, opt_g, z2, y2, scale=scale)
            ema_update(model.ema, model.G, cfg.ema)
    if not compiled:
        with FlopCounterMode(display=False) as f: step()
        row['gflop'] = f.get_total_flops()/1e9
    else:
        step()
        step()
    row['seconds'] = t = median(step, steps, device)
    assert not scale or scale.good >= 2*steps, 'steps that overflowed were timed'
    if dtype != 'plain' and not without and not compiled:
        def norm():                                                           # all that a step does for it
            with autocast():
                spectral.spectral_step(model.D)
                spectral.spectral_step(model.G)
                for net in (model.G, model.D):
                    model.requires_grad_(False)
                    net.requires_grad_(True)  # the other one's quotient takes no gradient
                    with spectral.normalised(model.G), spectral.normalised(model.D):
                        for _, sn, _ in spectral.spectral_layers(net): sn.ready.grad = sn.ready.detach()
            model.zero_grad()
        def update():
            opt_d.step()
            opt_g.step()
            ema_update(model.ema, model.G, cfg.ema)
        model.G.requires_grad_(True), model.D.requires_grad_(True)
        step()
        row['updates'] = median(update, 5, device)/t
        row['spectral_norm'] = median(norm, 5, device)/t
        loader = iter(MemoryLoader(Images(torch.zeros(4000, 3, px, px, dtype=torch.uint8), torch.zeros(4000, dtype=torch.int64), [], 'zeros'), cfg.batch, device=device))
        row['data'] = median(lambda: next(loader), 20, device)/t
    row['memory_gb'] = torch.cuda.max_memory_allocated()/1e9 if device == 'cuda' else int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1e6
    if not without:
        row['peak_product'], row['peak_convolution'] = peaks(HALF.get(dtype, torch.float32), device)
    return row

def table(rows):
    "The rows as Markdown: ratios to the plain step of the same size"
    base = {r['px']: r['seconds'] for r in rows if r['dtype'] == 'plain'}
    lines = ['| pixels | step | seconds | images/s | times plain | GFLOP | GFLOP/s | of the convolution peak '
             '| spectral norm | optimisers, average | data | memory, GB |', '|' + '---|'*12]
    def share(r, k): return f'{r[k]:.1%}' if k in r else ''
    for r in rows:
        if r['without']: continue
        rate = r['gflop']/r['seconds'] if 'gflop' in r else None
        lines.append(f"| {r['px']} | {r['dtype']}{', compiled' if r['compiled'] else ''} | "
                     f"{r['seconds']:.2f} | {r['batch']/r['seconds']:.1f} | {base[r['px']]/r['seconds']:.2f} "
                     f"| {f'''{r['gflop']:.0f}''' if rate else ''} "
                     f"| {f'{rate:.0f}' if rate else ''} | "
                     f"{f'''{rate/r['peak_convolution']:.0%}''' if rate else ''} | "
                     f"{shard(r, 'spectral_norm')} | {shard(r, 'updates')} | {shard(r, 'data')} | "
                     f"{r['memory_gb']:.1f} |")
    whole = {(r['px'], r['dtype']): r['seconds'] for r in rows if not r['without'] and not r['compiled']}
    if any(r['without'] for r in rows):
        lines += ['', '| pixels | dtype | undone | seconds | times as long |', '|---|---|---|---|---|']
    lines += [f"| {r['px']} | {r['dtype']} | {r['without'].replace('_', ' ')} | {r['seconds']:.2f} | "
              f"{r['seconds']/whole[r['px'], r['dtype']]:.2f} |" for r in rows if r['without']]
    return '\n'.join(lines)

if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('px', type=int, nargs='*', default=[32, 128])
    p.add_argument('--choices', default='all', choices=['all', 'none'])
    p.add_argument('--out')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--compile', action='store_true')
    p.add_argument('--steps', type=int, default=3)
    p.add_argument('--row')
    a = p.parse_args()
    if a.row:
        print(json.dumps(measure(**json.loads(a.row))))
        sys.exit()
    rows, fast = [], fastest_dtype(a.device)
    for px in a.px:
        asked = [('plain', None, False), ('float32', None, False)] + [('tf32', None, False), ('float16', None, False)]*(a.device == 'cuda') + [('bfloat16', None, False)]*(fast == 'bfloat16') + [(d, None, True) for d in dict.fromkeys(('float32', fast))]*a.compile
        if a.choices == 'all': asked += [(fast, c, False) for c in CHOICES]
        for dtype, without, compiled in asked:
            job = json.dumps(dict(px=px, dtype=dtype, device=a.device, without=without, compiled=compiled, steps=a.steps))
            done = subprocess.run([sys.executable, __file__, '--row', job], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr, flush=True)
    about = dict(machine=torch.cuda.get_device_name() if a.device == 'cuda' else f"{torch.get_num_threads()} threads, {(torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}).get('cpu_name', platform.processor())}", torch=torch.__version__)
    if a.out: open(a.out, 'w').write(json.dumps(dict(about, rows=rows), indent=1))
    print(f"{about['machine']}, PyTorch {about['torch']}\n\n{table(rows)}")
