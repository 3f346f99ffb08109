"Exercises of pages 03 to 05: each check takes the folded solution and refuses wrong answers"
import pytest, torch
from test_exercises_00 import answer, page

per_class = '''def per_class(x, y):
    h = torch.empty_like(x)
    for c in y.unique():
        of_class = x[y == c]
        mean = of_class.mean(DIMS, keepdim=True)
        var = of_class.var(DIMS, unbiased=False, keepdim=True)
        h[y == c] = (of_class - mean)/(var + 1e-5).sqrt()
    return h'''
joined = '''def joined(n1, m1, v1, n2, m2, v2):
    n = n1 + n2
    m = MEAN
    return m, VARIANCE'''
between = '(n1*v1 + n2*v2)/n + (m2 - m1)**2*(n1*n2/n**2)'
g_parameters = '''def g_parameters(ch, n_classes, z_dim):
    blocks = sum(2*n_classes*(a + b) + 9*a*b + b + 9*b*b + b + a*b + b for a, b in zip(ch, ch[1:]))
    return (z_dim + 1)*16*ch[0] + blocks + 2*ch[-1] + 9*ch[-1]*3 + 3'''
sloppy = '''def sloppy(block, x):
    a = F.relu(x)
    h = block.conv2(F.relu(block.conv1(a)))
    return F.avg_pool2d(h + block.skip(x), 2)'''
adam_step = '''def adam_step(w, g, v, t, lr, beta2):
    v = beta2*v + (1 - beta2)*g**2
    return w - lr*g/((v/(1 - beta2**t)).sqrt() + 1e-8), v'''
distance = '''def distance(beta1, turns):
    g, d = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for net in (g, d): nn.init.ones_(net.weight)
    opt_g, opt_d = ttur(g, d, .02, .02, (beta1, .9))
    def move(opt, loss):
        opt.zero_grad()
        loss.sum().backward()
        opt.step()
    for _ in range(turns):
        move(opt_d, -d.weight*g.weight.detach())
        move(opt_g, d.weight.detach()*g.weight)
    return (g.weight**2 + d.weight**2).sqrt().item()'''
first, second = distance.splitlines()[9:11]
wrong = {
    ('03_conditioning', 1): [
        'def per_class(x, y): return F.batch_norm(x, None, None, training=True)',  # all classes together
        'def per_class(x, y): return F.instance_norm(x)',  # each image by itself
        per_class.replace('DIMS', '(0, 1, 2, 3)'),  # all channels together
        per_class.replace('DIMS', '(0, 2, 3)').replace('/(var + 1e-5).sqrt()', '')],  # the mean only
    ('03_conditioning', 2): [
        joined.replace('MEAN', '(n1*m1 + n2*m2)/n').replace(
            'VARIANCE', '(n1*(v1 + m1**2) + n2*(v2 + m2**2))/n - m**2'),  # loses digits
        joined.replace('MEAN', '(n1*m1 + n2*m2)/n').replace('VARIANCE', '(n1*v1 + n2*v2)/n'),
        joined.replace('MEAN', '(m1 + m2)/2').replace('VARIANCE', between),  # sizes forgotten
        joined.replace('MEAN', 'm1 + (m2 - m1)*(n1/n)').replace('VARIANCE', between)],  # exchanged
    ('03_conditioning', 3): [
        'def best(m, n): return n - m, (m.square().sum(1) - n.square().sum(1))/2',  # the other way round
        'def best(m, n): return m - n, torch.zeros(len(m))',  # without c
        'def best(m, n): return m - n, n.square().sum(1) - m.square().sum(1)'],  # without the half
    ('04_networks', 1): [
        g_parameters.replace('+ 3', '').replace('9*a*b + b', '9*a*b'),  # without biases
        g_parameters.replace('2*n_classes', 'n_classes'),  # one table
        g_parameters.replace(' + 2*ch[-1]', ''),  # without the last batch norm
        g_parameters.replace('(a + b) + 9', '(2*b) + 9')],  # both norms after the convolutions
    ('04_networks', 2): [
        'def pooled_kernel(w): return F.pad(w, (0, 1, 0, 1))',
        'def pooled_kernel(w): return sum(F.pad(w, (i, 1 - i, i, 1 - i)) for i in (0, 1))/2',  # the diagonal
        'def pooled_kernel(w): return sum(F.pad(w, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))'],
    ('04_networks', 3): [
        sloppy,  # not sloppy
        'def sloppy(block, x): return block(x)',
        'def sloppy(block, x): return F.relu(block(x))',
        sloppy.replace('block.skip(x)', 'block.skip(a)').replace('conv1(a)', 'conv1(x)')],
    ('05_losses', 1): [
        'def teaching(real, fake): return torch.cat([real < 0, fake > 0]).float().mean().item()',  # no margin
        'def teaching(real, fake): return (real < 1).float().mean().item()',
        'def teaching(real, fake): return ((real < 1).float().mean() + (fake > -1).float().mean()).item()/2'],
    ('05_losses', 2): [
        adam_step.replace('(v/(1 - beta2**t))', 'v'),  # without the correction of the start
        adam_step.replace('.sqrt() + 1e-8', '').replace('v/(', '1e-8 + v/('),  # neither root
        adam_step.replace('.sqrt() + 1e-8)', ' + 1e-8).sqrt()'),  # epsilon below the root
        adam_step.replace('w - lr', 'w + lr')],
    ('05_losses', 3): [
        distance.replace(first, '').replace(second, f'{second}\n{first}'),  # g moves first
        distance.replace(first, '        before = d.weight.detach().clone()\n' + first).replace(
            second, second.replace('d.weight.detach()', 'before')),  # both at once
        distance.replace('-d.weight', 'd.weight').replace('(opt_g, d', '(opt_g, -d'),  # exchanged
        distance.replace('(beta1, .9)', '(beta1, .999)')]}


@pytest.mark.parametrize('name, number', wrong)
def test_a_check_takes_the_solution_and_refuses_wrong_answers(name, number):
    answer(name, number)
    for text in wrong[name, number]:
        with pytest.raises(AssertionError): answer(name, number, text)


def test_momentum_carries_the_two_players_away():
    "They start at a distance of 1.41, and the folded solution says where they end"
    names, pairs = page('05_losses')
    scope = dict(names)
    exec(pairs[2][0], scope)
    ends = {beta1: scope['distance'](beta1, 500) for beta1 in (0., .5, .9)}
    assert ends[0.] < .1 < ends[.5] < 1 and ends[.9] > 2
    assert [f'{end:.2f}' in pairs[2][0] for end in ends.values()] == [True]*3


def test_adam_s_first_step_is_the_learning_rate():
    names, pairs = page('05_losses')
    scope = dict(names)
    exec(pairs[1][0], scope)
    step, _ = scope['adam_step'](torch.zeros(()), torch.tensor(1000.), 0., 1, 1e-4, .9)
    assert abs(step.item() + 1e-4) < 1e-9
