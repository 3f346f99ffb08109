"""Equations 1 and 2, forward and backward on the CPU: the two plain lines, PyTorch's fused call on padded
tensors, and our blocks of rows. Times at sizes of the networks; then peak memory, each in a separate process.

    python benchmarks/attention.py"""
import statistics, subprocess, sys, time, torch
from pathlib import Path
from sagan.attention import attention_weights
from sagan.kernels import blockwise_attention, fused_attention

def explicit(q, k, v): return attention_weights(q, k) @ v
FORMS = dict(explicit=explicit, fused=fused_attention, blocks=blockwise_attention)

# batch, queries, keys, width of queries and keys, width of values
SHAPES = ((64, 256, 64, 32, 128), (64, 256, 256, 32, 256), (128, 256, 256, 16, 128),
          (8, 1024, 1024, 32, 256), (16, 1024, 1024, 16, 128), (16, 1024, 256, 16, 64),
          (4, 4096, 4096, 16, 128), (8, 4096, 1024, 16, 64), (4, 4096, 4096, 16, 16))

def inputs(B, Nq, Nk, D, Dv, dtype):
    g = torch.Generator().manual_seed(0)
    sizes = (Nq, D), (Nk, D), (Nk, Dv)
    return [torch.randn(B, n, d, generator=g).to(dtype).requires_grad_() for n, d in sizes]

def forward_and_backward(f, qkv):
    o = f(*qkv)
    torch.autograd.grad(o, qkv, o)

def seconds(f, qkv, repeats=5):
    "Median seconds of a forward and backward pass, after one to warm up"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        forward_and_backward(f, qkv)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def memory(form, N):
    """GB by which the process grows over one forward and backward pass
    of one image with 64 channels and values as wide as in the preprint's form"""
    qkv, small = inputs(1, N, N, 8, 64, torch.float32), inputs(1, 64, 64, 8, 64, torch.float32)
    forward_and_backward(FORMS[form], small)  # what the first call loads does not count
    def peak():
        "The process's peak memory in GB; known only on Linux"
        if sys.platform != 'linux': return float('nan')
        return int(Path('/proc/self/status').read_text('utf-8').split('VmHWM:')[1].split()[0])/1e6
    before = peak()
    forward_and_backward(FORMS[form], qkv)
    return peak() - before

def memory_in_a_process(form, N):
    command = [sys.executable, __file__, form, str(N)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

if __name__ == '__main__':
    if sys.argv[1:]:
        print(memory(sys.argv[1], int(sys.argv[2])))
        sys.exit()
    print(f'{torch.get_num_threads()} threads\n\n| dtype | batch | queries | keys | q, k | v | map, million '
          '| explicit, ms | fused, ms | blocks, ms | taken |\n' + '|---'*11 + '|')
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            qkv, entries = inputs(*shape, dtype), shape[0]*shape[1]*shape[2]
            ms = [f'{seconds(f, qkv)*1e3:.0f}' for f in FORMS.values()]
            lean = 'blocks' if shape[3] < shape[4] else 'fused'
            taken = 'explicit' if entries <= 2**23 else lean  # as in `attend`
            cells = str(dtype)[6:], *shape, f'{entries/1e6:.1f}', *ms, taken
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print('\n| locations | ' + ' | '.join(f'{k}, GB' for k in FORMS) + ' |\n|' + '---|'*3)
    for N in (4096, 8192, 16384):
        gb = [f'{memory_in_a_process(form, N):.3f}' for form in FORMS]
        print(f"| {N} | {' | '.join(gb)} |", flush=True)
