"""Equations 1 and 2, forward and backward on the CPU: the two plain lines against PyTorch's
fused call. Times at sizes of the networks; then peak memory, each in a process of its own.

    python benchmarks/attention.py"""
import statistics, subprocess, sys, time, torch, torch.nn.functional as F
from pathlib import Path
from sagan.attention import attention_weights

def explicit(q, k, v): return attention_weights(q, k) @ v
def fused(q, k, v):
    d = max(q.shape[-1], v.shape[-1])  # its kernel on the CPU wants heads of one size
    q, k, w = [F.pad(t, (0, d - t.shape[-1]))[:, None] for t in (q, k, v)]
    return F.scaled_dot_product_attention(q, k, w, scale=1.)[:, 0, :, :v.shape[-1]]
FORMS = dict(explicit=explicit, fused=fused)

def inputs(B, Nq, Nk, D, Dv, dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, d, generator=g).to(dtype).requires_grad_() for n, d in ((Nq, D), (Nk, D), (Nk, Dv))]

def both(f, qkv):
    o = f(*qkv)
    torch.autograd.grad(o, qkv, o)

def seconds(f, qkv, repeats=5):
    "Median seconds of a forward and backward pass, after one to warm up"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        both(f, qkv)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def memory(form, N):
    "GB by which the process grows over one forward and backward pass of one image at 64 channels with values as wide as in the preprint's form"
    qkv, small = inputs(1, N, N, 8, 64, torch.float32), inputs(1, 64, 64, 8, 64, torch.float32)
    both(FORMS[form], small)  # what the first call loads does not count
    # the most it has held, GB; Linux
    def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1e6
    before = peak()
    both(FORMS[form], qkv)
    return peak() - before

if __name__ == '__main__':
    if sys.argv[1:]:
        print(memory(sys.argv[1], int(sys.argv[2])))
        sys.exit()
    print(f'{torch.get_num_threads()} threads\n\n| dtype | batch | queries | keys | q, k | v | map, million '
          f'| explicit, ms | fused, ms | taken |\n' + '|---'*10 + '|')
    for dtype in (torch.float32, torch.bfloat16):
        for shape in [(64, 256, 64, 32, 128), (64, 256, 256, 32, 256), (128, 256, 256, 16, 128), (8, 1024, 1024, 32, 256), (16, 1024, 1024, 16, 128), (16, 1024, 256, 16, 64), (4, 4096, 4096, 16, 128), (8, 4096, 1024, 16, 64)]:
            qkv = inputs(*shape, dtype)
            t = {k: seconds(f, qkv) for k, f in FORMS.items()}
            B, Nq, Nk, D, Dv = shape
            print(f"| {str(dtype)[6:]} | {B} | {Nq} | {Nk} | {D} | {Dv} | {B*Nq*Nk/1e6:.1f} | " + ' | '.join(f'{t[k]*1e3:.0f}' for k in FORMS) + f" | {'explicit' if B*Nq*Nk <= 2**23 else 'fused'} |", flush=True)
    print('\n| locations | ' + ' | '.join(f'{k}, GB' for k in FORMS) + ' |\n|' + '---|'*3)
    for N in (4096, 8192, 16384):
        gb = [float(subprocess.run([sys.executable, __file__, k, str(N)], stdout=subprocess.PIPE, text=True, check=True).stdout) for k in FORMS]
        print(f'| {N} | ' + ' | '.join(f'{m:.3f}' for m in gb) + ' |', flush=True)
