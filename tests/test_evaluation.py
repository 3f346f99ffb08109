"Scores and references: closed forms, other implementations, limits, errors and memory"
import json, math, warnings, weakref
from dataclasses import asdict, replace
from unittest.mock import patch

import numpy as np, pytest, scipy.linalg, torch, torch.nn.functional as F
from sagan.data import digits, Images, to_unit
from sagan.evaluation import (
    _covered, _distance_of_samples, _squared_mmd, class_spread, frechet_distance, inception_score,
    intra_frechet_distance, kernel_distance, nearest_images, precision_recall, real_distances, score, Scores)
from sagan.nearest import _nearest
from sagan.references import (
    Classifier, Evaluator, feature_statistics, inception, reference, train_evaluator)
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric


@pytest.fixture(scope='module')
def evaluator(): return train_evaluator(digits())


@pytest.fixture(scope='module')
def ref(evaluator): return reference(digits(), evaluator)


@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    "Random weights of the right shapes"
    extractor = 'torch_fidelity.feature_extractor_inceptionv3'
    with (patch.object(FeatureExtractorInceptionV3, 'load_state_dict'),
          patch(f'{extractor}.load_state_dict_from_url')):
        net = FeatureExtractorInceptionV3('random', ['2048'])
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d): torch.nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
    file = tmp_path_factory.mktemp('inception')/'random.pth'
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope='module')
def cases():
    "All digits as they are, with noise, and one per class again and again"
    x, y = to_unit(digits().x), digits().y
    first = torch.stack([(y == c).nonzero()[0, 0] for c in range(10)])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return {'real': x, 'noisy': (x + .5*noise).clamp(-1, 1), 'collapsed': x[first][y]}


@pytest.fixture(scope='module')
def results(cases, evaluator, ref):
    return {k: score(v, digits().y, evaluator, ref) for k, v in cases.items()}


def fd_by_scipy(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1.numpy() @ sigma2.numpy())
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()).item() - 2*np.trace(root).real


# Inception score

def naive_score(p):
    marginal = [sum(row[c] for row in p)/len(p) for c in range(len(p[0]))]
    kl = [sum(q*math.log(q/m) for q, m in zip(row, marginal) if q > 0) for row in p]
    return math.exp(sum(kl)/len(kl))


def test_inception_score_of_known_answers():
    K, n, q = 10, 1000, .9
    sure = torch.eye(K).repeat(n//K, 1)
    assert inception_score(torch.full((n, K), 1/K))[0] == pytest.approx(1, abs=1e-5)
    assert inception_score(sure[:1].repeat(n, 1))[0] == pytest.approx(1, abs=1e-5)
    three = [[1., 0.], [0., 1.], [.5, .5]]
    assert inception_score(torch.tensor(three), splits=1)[0] == pytest.approx(naive_score(three), abs=1e-6)
    p = torch.tensor([[q, 1-q], [1-q, q]]).repeat(n//2, 1)
    exact = 2*math.exp(q*math.log(q) + (1-q)*math.log(1-q))
    assert inception_score(p, splits=1)[0] == pytest.approx(exact, abs=1e-6)


def test_inception_score_takes_probabilities():
    for p in (torch.randn(99, 10), torch.tensor([[2., -1.]]).repeat(99, 1), torch.full((99, 2), torch.nan)):
        with pytest.raises(ValueError, match='that sum to 1'): inception_score(p)


# Frechet distance

def test_frechet_distance_of_numbers():
    one_by_one = [torch.tensor(t, dtype=torch.float64) for t in ([0.], [[1.]], [3.], [[4.]])]
    assert frechet_distance(*one_by_one) == pytest.approx(10, abs=1e-5)


def test_statistics_and_closed_forms():
    "Batches change nothing; equal sets, shifts, scales, and another set by SciPy"
    torch.manual_seed(0)
    f = torch.randn(2000, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
    mu, sigma = feature_statistics(f)
    np.testing.assert_allclose(mu, f.numpy().mean(0), atol=1e-5)
    np.testing.assert_allclose(sigma, np.cov(f.numpy().T), atol=1e-9)
    for a, b in zip((mu, sigma), feature_statistics(f.split(300))):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)
    d = torch.arange(16.).double()
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(mu, sigma, mu + d, sigma) == pytest.approx(d.square().sum().item(), abs=1e-6)
    assert frechet_distance(mu, sigma, mu, 9*sigma) == pytest.approx(4*sigma.trace().item(), abs=1e-6)
    other = feature_statistics(torch.randn(2000, 16) @ torch.randn(16, 16))
    assert frechet_distance(mu, sigma, *other)/fd_by_scipy(mu, sigma, *other) == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match='NaN'): feature_statistics(f*torch.nan)
    with pytest.raises(ValueError, match='different dimensions'):
        frechet_distance(mu, sigma, mu[:4], sigma[:4, :4])


def conditioned(n, decades, g):
    "Statistics of n features in 64 dimensions whose covariance has a condition number of about 10**decades"
    double = dict(dtype=torch.float64, generator=g)
    scales = torch.logspace(0, -decades/2, 64, dtype=torch.float64)
    A = torch.linalg.qr(torch.randn(64, 64, **double)).Q*scales
    return feature_statistics(torch.randn(n, 64, **double) @ A.T + .1*torch.randn(64, **double))


@pytest.mark.parametrize('n, decades', [(5000, 0), (5000, 6), (5000, 12), (40, 2)])
def test_covariances_far_from_round(n, decades):
    "Against SciPy's root of the product, up to a condition number of 1e12 and without full rank"
    g = torch.Generator().manual_seed(0)
    one, two = conditioned(n, decades, g), conditioned(n, decades, g)
    assert abs(frechet_distance(*one, *two)/fd_by_scipy(*one, *two) - 1) < 1e-6


@pytest.mark.parametrize('decades', [0, 12])
def test_floor_under_what_can_be_told_apart(decades):
    "The same covariance twice, and means apart by 0.001: rounding hides it where eigenvalues are nearly 0"
    mu, sigma = conditioned(5000, decades, torch.Generator().manual_seed(0))
    d = torch.full((64,), .001/8, dtype=torch.float64)
    errors = [abs(fd(mu, sigma, mu + d, sigma)/1e-6 - 1) for fd in (frechet_distance, fd_by_scipy)]
    assert max(errors) < 1e-6 if decades == 0 else min(errors) > 1e-4


# Intra-FID

def test_distance_without_covariances():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(10, 16, dtype=torch.float64, generator=g)
    h = torch.randn(40, 16, dtype=torch.float64, generator=g) + 1
    by_covariances = frechet_distance(*feature_statistics(f), *feature_statistics(h))
    assert _distance_of_samples(f, h)/by_covariances == pytest.approx(1, abs=1e-6)


def test_intra_fid_is_the_mean_over_classes():
    "With one class the FID; with two the mean of the distances per class, by SciPy"
    g = torch.Generator().manual_seed(0)
    real_y = torch.arange(1000) % 2
    real_f = torch.randn(1000, 2, generator=g) * torch.tensor([[1., 1], [1, 2]])[real_y]
    real_f[:, 0] += 6*real_y
    f, y = real_f[:600] + .3, real_y[:600]
    one = torch.zeros_like(y), torch.zeros_like(real_y)
    pooled = frechet_distance(*feature_statistics(f), *feature_statistics(real_f))
    assert intra_frechet_distance(f, one[0], real_f, one[1]) == pytest.approx(pooled, abs=1e-9)
    def statistics(c): return *feature_statistics(f[y == c]), *feature_statistics(real_f[real_y == c])
    by_hand = (fd_by_scipy(*statistics(0)) + fd_by_scipy(*statistics(1)))/2
    assert intra_frechet_distance(f, y, real_f, real_y) == pytest.approx(by_hand, abs=1e-6)


# Kernel distance, precision and recall

def test_squared_mmd_may_be_negative():
    rng = np.random.RandomState(0)
    assert min(_squared_mmd(*rng.randn(2, 10, 5)) for _ in range(400)) < 0


def test_kernel_distance_by_hand():
    "From its double sums"
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 5, generator=g), torch.randn(40, 5, generator=g) + .3
    def mean_k(A, B, same):
        pairs = [(i, j) for n, i in enumerate(A.numpy()) for m, j in enumerate(B.numpy())
                 if not (same and n == m)]
        return np.mean([(np.dot(i, j)/5 + 1)**3 for i, j in pairs])
    exact = mean_k(a, a, True) + mean_k(b, b, True) - 2*mean_k(a, b, False)
    assert kernel_distance(a, b, 1)[0] == pytest.approx(exact, abs=1e-5)


def test_kernel_distance_precision_and_recall_of_torch_fidelity():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 5, generator=g), torch.randn(50, 5, generator=g) + .3
    theirs = kid_features_to_metric(a, b, kid_subset_size=30, verbose=False)
    theirs |= prc_features_to_metric(a, b, verbose=False)
    kid, spread = kernel_distance(a, b, size=30)
    assert kid/theirs['kernel_inception_distance_mean'] == pytest.approx(1, abs=1e-4)
    assert spread/theirs['kernel_inception_distance_std'] == pytest.approx(1, abs=1e-4)
    assert precision_recall(a, b) == (theirs['precision'], theirs['recall'])
    with pytest.raises(ValueError, match='more than 3 images'): precision_recall(a[:3], b)
    with pytest.raises(ValueError, match='different dimensions'): kernel_distance(a, b[:, :4])
    assert _covered(a, a, 1) == 1


def test_balls_on_a_line():
    "0, 1, 2 and 9 have their nearest other one at 1, 1, 1 and 7; 17 is in no ball"
    on_a_line = torch.tensor([[0.], [1.], [2.], [9.]])
    assert _covered(torch.tensor([[-.5], [3.], [3.5], [17.]]), on_a_line, k=1) == .75


def test_clouds_over_a_square():
    "The same cloud, one that overlaps by half, one that has collapsed, and one too wide"
    torch.manual_seed(0)
    real = torch.rand(1000, 2)
    same, half = torch.rand(1000, 2), torch.rand(1000, 2) + torch.tensor([.5, 0])
    collapsed, wide = torch.rand(1000, 2)*.1 + .45, torch.rand(1000, 2)*3 - 1
    assert precision_recall(half, real) == pytest.approx((.5, .5), abs=.08)
    precision, recall = precision_recall(collapsed, real)
    assert precision > .95 and recall < .1
    precision, recall = precision_recall(wide, real)
    assert precision < .3 and recall > .7
    assert abs(kernel_distance(same, real, 10)[0]) < .005 < kernel_distance(half, real, 10)[0]


# Evaluators

def test_classifier():
    "Features alone without classes; of 64 pixels it sees no more than of 32"
    g = torch.Generator().manual_seed(0)
    net, x = Classifier(10).eval(), torch.rand(2, 3, 64, 64, generator=g)*2 - 1
    assert Classifier(0)(x).shape == (2, 64)
    for a, b in zip(net(x), net(F.avg_pool2d(x, 2))): assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_what_an_evaluator_measures(evaluator):
    "Bytes as floats; nothing but images"
    x = digits().x[:5]
    assert torch.equal(evaluator.measure(to_unit(x))[0], evaluator.measure(x)[0])
    for bad, message in ((x.long(), 'uint8, or float'), (x[0], r'shape \(B, 3, S, S\)'),
                         (x.float(), r'in \[-1, 1\], got values from 0 to 255')):
        with pytest.raises(ValueError, match=message): evaluator.measure(bad)


def test_files_that_are_no_inception_weights(tmp_path):
    (tmp_path/'text.pth').write_text('not weights', encoding='utf-8')
    (tmp_path/'empty.pth').touch()
    torch.save(dict(a=torch.zeros(3)), tmp_path/'other.pth')
    for file in ('text.pth', 'empty.pth', 'other.pth'):
        with pytest.raises(ValueError, match="not a file of torch-fidelity's Inception weights"):
            inception(tmp_path/file)
    with pytest.raises(FileNotFoundError, match='there are no Inception weights at'):
        inception(tmp_path/'none.pth')


def test_inception_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with patch('torch.hub.urlopen', side_effect=OSError('no network')):
        with pytest.raises(OSError, match='download https'): inception()


# References

def test_a_reference_belongs_to_its_images(evaluator, inception_file, tmp_path):
    file = tmp_path/'reference.safetensors'
    ref = reference(digits(), evaluator, file=file)
    whole = torch.cat([evaluator.measure(x)[0] for x in digits().batches()])
    assert torch.allclose(ref.mu, whole.double().mean(0), rtol=0, atol=1e-6)
    other = inception(inception_file)
    for message, args in {"its evaluator is 'small CNN": (digits(), other),
                          "its count is '1797' instead of '100'": (digits()[:100], evaluator),
                          "its size is '32' instead of '64'": (digits(64), evaluator),
                          "its split is 'all' instead of 'test'": (digits(), evaluator, 'test')}.items():
        with pytest.raises(ValueError, match=message): reference(*args, file=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='not a complete file'): reference(digits(), evaluator, file=file)
    with pytest.raises(ValueError, match='use the same evaluator'): score(digits().x, digits().y, other, ref)


def test_too_few_images_for_a_covariance(evaluator):
    with pytest.warns(UserWarning, match='50 images are too few for 64 features'):
        reference(digits()[:50], evaluator)


class Counted:
    "Images that count how many of their batches are still in memory"
    name, size, interpolation, y = 'counted', 32, 'none', torch.zeros(2000, dtype=torch.int64)
    digest = '0'*16
    def __init__(self): self.alive, self.most = [], 0
    def __len__(self): return 2000
    def __getitem__(self, i): return self  # all of them: there is one process
    def batches(self, n):
        for i in range(0, 2000, n):
            x = digits().x[:n] + 0
            self.alive.append(weakref.ref(x))
            self.most = max(self.most, sum(r() is not None for r in self.alive))
            yield x


class ManyLogits(torch.nn.Module):
    "Counts how many of its outputs are still in memory"
    def __init__(self):
        super().__init__()
        self.alive, self.most = [], 0
    def forward(self, x):
        logits = torch.zeros(len(x), 1008)
        self.alive.append(weakref.ref(logits))
        self.most = max(self.most, sum(r() is not None for r in self.alive))
        return x.mean((2, 3)), logits


def test_constant_memory():
    "Images and probabilities of a batch are gone before the one after the next is measured"
    counted, many = Counted(), ManyLogits()
    reference(counted, Evaluator(many, 'many logits'))
    assert len(counted.alive) == 20 and max(counted.most, many.most) <= 2


# Scores

def test_class_spread():
    "A class of one has no pairs"
    points, labels = torch.tensor([[0.], [2.], [10.], [11.], [12.], [50.]]), torch.tensor([0, 0, 1, 1, 1, 2])
    assert class_spread(points, labels).item() == pytest.approx((2 + (1 + 1 + 2)/3)/2)
    assert class_spread(points[1:3], labels[1:3]).isnan()


def test_a_record_fits_into_a_log(results):
    r = Scores(**asdict(results['real']))
    assert json.loads(json.dumps(asdict(r))) == asdict(results['real'])


def test_scores_of_known_images(results):
    "Real images, noise, and a collapsed generator, which accuracy and the Inception score call perfect"
    real, noisy, collapsed = results.values()
    assert real.fid == pytest.approx(0, abs=1e-3) and real.intra_fid == pytest.approx(0, abs=1e-3)
    assert real.diversity == pytest.approx(1, abs=1e-5)
    assert noisy.fid > 1 and collapsed.fid > real.fid + .1
    assert (collapsed.accuracy, round(collapsed.diversity, 3)) == (1., 0.)
    assert noisy.inception_score < real.inception_score <= 10 and noisy.diversity > 1
    assert collapsed.inception_score > .95*real.inception_score
    assert real.precision == real.recall == 1 and noisy.precision < .5
    assert collapsed.precision == 1 and collapsed.recall < .1
    assert real.kid < 1e-3 < collapsed.kid


def test_scores_of_batches(cases, results, evaluator, ref):
    in_batches = score(cases['real'].split(77), digits().y, evaluator, ref)
    assert in_batches.fid == pytest.approx(results['real'].fid, abs=1e-3)
    assert in_batches.accuracy == pytest.approx(results['real'].accuracy, abs=1e-6)


def test_scores_of_wrong_labels(cases, evaluator, ref):
    r = score(cases['real'], (digits().y + 1) % 10, evaluator, ref)
    assert r.fid == pytest.approx(0, abs=1e-3) and r.intra_fid > 10 and r.accuracy < .02


def test_what_cannot_be_scored(cases, evaluator, ref):
    x, y = cases['real'], digits().y
    for message, args in {r'in \[-1, 1\]': (x*3, y), 'at least 10': (x[:5], y[:5]),
                          'images for 1797 labels': (x[:50], y),
                          'images of 64 px cannot be scored against a reference of 32 px':
                              (torch.zeros(20, 3, 64, 64), y[:20])}.items():
        with pytest.raises(ValueError, match=message): score(*args, evaluator, ref)


def test_scores_without_classes(cases):
    "By random features: distances, but neither accuracy nor an Inception score"
    unlabeled = Images(digits().x[:600], torch.zeros(600, dtype=torch.int64), [], 'unlabeled digits')
    blind = train_evaluator(unlabeled)
    real, noisy, collapsed = [score(v[:600], unlabeled.y, blind, unlabeled) for v in cases.values()]
    assert real.intra_fid is None and real.accuracy is None and real.inception_score is None
    assert real.fid < 1e-6 < collapsed.fid and noisy.fid > 100*max(real.fid, 1e-6)


# Nearest images

@pytest.mark.parametrize('rows', [4, 1])
def test_nearest_rows(rows):
    on_a_line = torch.tensor([[0.], [4.], [1.], [9.]])
    found, distance = _nearest(torch.tensor([[.9], [8.]]), on_a_line.split(rows), 3)
    assert found.tolist() == [[2, 0, 1], [3, 1, 2]]
    assert distance[0].tolist() == pytest.approx([.1, .9, 3.1], abs=1e-3)


def test_nearest_training_images(evaluator):
    "Images find themselves at 0; copies are near, mirrored images far; both by features and by pixels"
    train, held_out = digits().split()
    ref = reference(train, evaluator)
    found, distance = nearest_images(train.x[:50], train, evaluator)
    assert torch.equal(found[:, 0], torch.arange(50)) and distance[:, 0].max() < 1e-4
    for a, b in zip((found, distance), nearest_images(train.x[:50], ref, evaluator)):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-4)
    assert (distance.diff(dim=1) >= 0).all()
    noise = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = to_unit(train.x[:300])
    sets = held_out.x, (first + .02*noise).clamp(-1, 1), first.flip(3)
    fresh, copies, mirrored = [nearest_images(v, train, evaluator, 1)[1].median() for v in sets]
    assert copies < .5*fresh < .5*mirrored
    assert .7 < real_distances(ref).median()/fresh < 1.3


def test_a_reference_of_someone_else(ref):
    moved = replace(ref, mu=ref.mu + 1, data='moved digits')
    assert frechet_distance(ref.mu, ref.sigma, moved.mu, moved.sigma) == pytest.approx(64, abs=1e-5)
