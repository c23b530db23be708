"""What an optimizer must do, in NumPy float64: the documented formula and Keras' order.

It knows nothing of the package, nor of Keras: variables are arrays with a name.
"""

import copy

import numpy as np

DEFAULTS = {
    "learning_rate": 0.001,
    "rho": 0.9,
    "momentum": 0.0,
    "epsilon": 1e-7,
    "centered": False,
    "weight_decay": None,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "epsilon_inside_sqrt": True,
    "initial_accumulator_value": 0.0,
    "bias_correction": False,
    "nesterov": False,
    "lr_in_momentum": True,
    "decoupled_weight_decay": True,
    "maximize": False,
    "ema_warmup": False,
    "skip_nonfinite": False,
}


class Oracle:
    """An optimizer and the weights that it updates.

    Args:
        weights: Arrays by name.
        options: Arguments of the optimizer.
        resets_all: Whether an update resets the sums of all gradients, as Keras does
            everywhere but on JAX; else of those that have a gradient in that step.
    """

    def __init__(self, weights, options, *, resets_all=True):
        self.w = {n: np.array(w, np.float64) for n, w in weights.items()}
        self.not_negative, self.frozen = set(), set()
        self.options, self.resets_all = DEFAULTS | options, resets_all
        self.restart()

    def restart(self):
        """Be a new optimizer of the same weights."""
        self.v, self.m, self.a, self.average, self.sums = {}, {}, {}, {}, {}
        self.calls = self.skipped = self.begin = 0

    def restart_as(self, found, iterations):
        """Be what was found: slots and average by name. Sums are as good as none."""
        skipped, begin = self.skipped, self.begin
        self.restart()
        self.build(found)
        self.skipped, self.begin = skipped, begin
        self.calls = iterations * (self.gradient_accumulation_steps or 1)
        for n, slots in found.items():
            mine = self.v, self.m, self.a, self.average
            for book, x in zip(mine, slots, strict=True):
                if x is not None:
                    book[n] = np.array(x, np.float64)

    def forget(self, names):
        """Forget the slots of some weights."""
        for book in (self.v, self.m, self.a, self.average, self.sums):
            for n in names:
                book.pop(n, None)

    def copy(self):
        return copy.deepcopy(self)

    def __getattr__(self, name):
        options = vars(self).get("options", {})
        if name not in options:
            raise AttributeError(name)
        return options[name]

    @property
    def iterations(self):
        return self.calls // (self.gradient_accumulation_steps or 1)

    def build(self, names):
        """Make the slots of variables that have none: averages are as weights now."""
        for n in names:
            if n not in self.v:
                zeros = np.zeros_like(self.w[n])
                self.v[n] = zeros + self.initial_accumulator_value
                self.m[n], self.a[n], self.sums[n] = zeros, zeros, zeros
                self.average[n] = self.w[n]

    def apply(self, grads):
        """Take a step: gradients by name, or None, all with the loss' scale."""
        self.build(grads)
        grads = {n: g for n, g in grads.items() if g is not None}
        if self.skip_nonfinite and not all(
            np.isfinite(g).all() for g in grads.values()
        ):
            self.skipped += 1
            return
        grads = {n: g / (self.loss_scale_factor or 1) for n, g in grads.items()}
        every = self.gradient_accumulation_steps
        if not every:
            self.update(grads)
        elif (self.calls + 1) % every:
            self.sums |= {n: self.sums[n] + g for n, g in grads.items()}
        else:
            self.update({n: (self.sums[n] + g) / every for n, g in grads.items()})
            for n in self.sums if self.resets_all else grads:
                self.sums[n] = 0 * self.sums[n]
        if self.use_ema:
            self.follow()
        for n in self.not_negative & {*grads}:
            self.w[n] = np.maximum(self.w[n], 0)
        self.calls += 1

    def follow(self):
        t = self.iterations
        share = self.ema_momentum if t else 0
        if self.ema_warmup:
            n = t - self.begin
            share = min(share, (1 + n) / (10 + n)) if t else 0
        for n, average in self.average.items():
            self.average[n] = share * average + (1 - share) * self.w[n]
        if self.ema_overwrite_frequency and (t + 1) % self.ema_overwrite_frequency == 0:
            self.overwrite()

    def end_fit(self):
        """Go on from the averages, which warm up again."""
        if self.use_ema:
            self.overwrite()
            self.begin = self.iterations

    def overwrite(self):
        """Replace weights by their averages, constrained; none of frozen layers."""
        for n in self.average.keys() - self.frozen:
            x = self.average[n]
            self.w[n] = np.maximum(x, 0) if n in self.not_negative else x

    def clipped(self, grads):
        if self.clipvalue:
            return {
                n: g.clip(-self.clipvalue, self.clipvalue) for n, g in grads.items()
            }
        norms = {n: np.sqrt((g**2).sum()) for n, g in grads.items()}
        if self.global_clipnorm:
            norm = np.sqrt(sum(x**2 for x in norms.values()))
            norms = dict.fromkeys(norms, norm)
        limit = self.clipnorm or self.global_clipnorm
        if not limit:
            return grads
        return {n: g * limit / max(norms[n], limit) for n, g in grads.items()}

    def update(self, grads):
        rate = self.learning_rate
        eta = float(np.float32(rate(self.calls) if callable(rate) else rate))
        for n, g in self.clipped(grads).items():
            w, decay = self.w[n], self.weight_decay or 0
            g = -g if self.maximize else g
            if self.decoupled_weight_decay:
                w = w * (1 - eta * decay)
            else:
                g = g + decay * w
            rho, mu = self.rho, self.momentum
            self.v[n] = rho * self.v[n] + (1 - rho) * g**2
            if self.centered:
                self.a[n] = rho * self.a[n] + (1 - rho) * g
            share = 1 - rho ** (self.iterations + 1) if self.bias_correction else 1
            spread = self.v[n] / share
            if self.centered:
                spread = spread - (self.a[n] / share) ** 2
            inside = self.epsilon_inside_sqrt
            root = np.sqrt(spread + self.epsilon * inside) + self.epsilon * (not inside)
            u = (eta if self.lr_in_momentum else 1) * g / root
            if mu:
                self.m[n] = mu * self.m[n] + u
                u = mu * self.m[n] + u if self.nesterov else self.m[n]
            self.w[n] = w - (1 if self.lr_in_momentum else eta) * u
