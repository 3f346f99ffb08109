"Fréchet distance at Inception's 2,048 features: eigenvalues (ours) against SciPy's matrix root"
from time import perf_counter
import numpy as np, torch
from scipy.linalg import sqrtm
from sagan.evaluation import frechet_distance
from sagan.references import feature_statistics

D, n = 2048, 5000
g = torch.Generator().manual_seed(0)
def statistics():
    return feature_statistics((torch.randn(n, D, generator=g) * torch.logspace(0, -2, D)).relu())

one, two = statistics(), statistics()
start = perf_counter()
ours = frechet_distance(*one, *two)
t_ours = perf_counter() - start
start = perf_counter()
(mu1, s1), (mu2, s2) = one, two
root = sqrtm(s1.numpy() @ s2.numpy())
scipys = (((mu1 - mu2)**2).sum() + s1.trace() + s2.trace()).item() - 2*np.trace(root).real
t_scipy = perf_counter() - start
print(f'{D} features, {torch.get_num_threads()} threads: eigenvalues {t_ours:.1f} s, scipy.linalg.sqrtm '
      f'{t_scipy:.1f} s, ratio {t_scipy/t_ours:.1f}; relative difference {abs(ours/scipys - 1):.0e}')
