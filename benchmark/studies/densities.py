"""MEow with splines in the place of its flow: a script for a grid, made to be measured on the 4-goal map.

    python -m benchmark.run runs/densities --preset densities
    python -m benchmark.studies.goal_map_optimum runs/densities --csv runs/densities/optimum.csv

Q_i = V_i + alpha log pi makes V_i the exact soft value of any normalised pi. Here are rational-quadratic splines on the
box (package zuko), in the script of the mixture, whose flags are the other flags. The preset has more.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # a grid runs this file by its path

import meow_mixture_continuous_action as mixture


class SplineMEow(mixture.MixtureMEow):
    """Splines of the box onto itself (Durkan et al. 2019), 8 bins, from the uniform distribution.

    Each transform is autoregressive: a dimension's spline depends on the state and on the dimensions before it, in
    turning order. With two dimensions that is what a coupling does.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: mixture.Args, transforms: int = 4, hidden: int = 64):
        import zuko

        super().__init__(obs_dim, action_dim, args)
        make = functools.partial(
            zuko.flows.MaskedAutoregressiveTransform,
            features=action_dim,
            context=obs_dim,
            univariate=functools.partial(zuko.transforms.MonotonicRQSTransform, bound=1.0),
            shapes=[(8,), (8,), (7,)],  # widths and heights of the bins, slopes at the knots between them
            hidden_features=(hidden, hidden),
            activation=nn.SiLU,
        )
        order, value = list(range(action_dim)), self.value
        del self.mixture, self.value  # V comes last again: make_update takes the end of the parameters for V's
        self.flow = zuko.lazy.LazyComposedTransform(*(make(order=order[:: (-1) ** k]) for k in range(transforms)))
        self.value = value

    def log_prob(self, obs, action):
        return self.flow(obs).call_and_ladj(action)[1] - self.action_dim * math.log(2)

    def sample(self, obs, deterministic=False):
        z = (torch.zeros if deterministic else torch.rand)(len(obs), self.action_dim)
        return self.flow(obs).inv(z if deterministic else 2 * z - 1).clamp(-1, 1)

    def policy_metrics(self, obs):
        return dict(entropy=-self.log_prob(obs, self.sample(obs)).mean())


DENSITIES = {  # name -> what makes the agent
    "splines-2": functools.partial(SplineMEow, transforms=2),
    "splines-4": SplineMEow,
    "splines-2-wide": functools.partial(SplineMEow, transforms=2, hidden=256),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--density", choices=DENSITIES, required=True)
    known, others = parser.parse_known_args()
    mixture.Agent = DENSITIES[known.density]
    mixture.train(mixture.parse_args(["--exp-name", f"densities_{known.density}", "--compile", "off", *others]))
