"Forward and backward of equations 1 and 2: two explicit lines against PyTorch's fused call, in one run on the CPU"
import time, torch, torch.nn.functional as F
from sagan.attention import attention_weights

def seconds(f, q, k, v, repeats):
    "Mean seconds of a forward and backward pass, after one to warm up"
    for i in range(repeats + 1):
        if i == 1: start = time.perf_counter()
        torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    return (time.perf_counter() - start)/repeats

if __name__ == '__main__':
    print('| batch | channels | locations | keys | explicit, ms | fused, ms | fused/explicit |\n|---|---|---|---|---|---|---|')
    for B, C, N, Nk in [(64, 32, 256, 256), (64, 64, 256, 64), (8, 256, 1024, 1024), (8, 256, 1024, 256), (2, 128, 4096, 1024)]:
        torch.manual_seed(0)
        q, k, v = [torch.randn(B, n, d, requires_grad=True) for n, d in [(N, C//8), (Nk, C//8), (Nk, C)]]
        a = seconds(lambda *t: attention_weights(*t[:2]) @ t[2], q, k, v, 10)
        b = seconds(lambda *t: F.scaled_dot_product_attention(*t, scale=1.), q, k, v, 10)
        print(f'| {B} | {C} | {N} | {Nk} | {a*1e3:.1f} | {b*1e3:.1f} | {b/a:.2f} |')
