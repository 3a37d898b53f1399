"""Compare sampling with scoring: before the first update on a rollout the policy is the one that
sampled it, so all ratios should be 1.

The two are different programs, which sum in different orders; ROUNDING is the mean of |ratio - 1|
that this explains. For tokens it grows with the logits: their error, an ulp or two, is the error of
a log-probability. Measured with the demo's model, of 2304 tokens at temperature 1 (token guidance
1.5): float32 9e-7 in the mean and 1.2e-5 at most, bfloat16 6e-3 and 0.12. For a denoising step,
whose log-probability is a mean over the latents, the error is negligible in float32; in bfloat16 it
must stay below the clip, which would otherwise act on rounding.
"""

from blip3o_jax.config import Config, UserError
from blip3o_jax.parallel.distributed import log_host0
from blip3o_jax.rl.registry import make_policies


class RatioMonitor:
    """Warn once if the mean gap is larger than rounding explains.

    Stops the run if the largest gap exceeds `rl.max_ratio_gap`.
    """

    def __init__(self, config: Config):
        self._rl = config.rl
        self._rounding = {
            f"{policy.metric_prefix}ratio_gap": policy.rounding for policy in make_policies(config)
        }
        self._warned = False

    def check(self, step: int, values: dict[str, float]) -> None:
        """Check the metrics of a step.

        Steps whose ratios differ from 1 by design are skipped: later updates on a rollout, and
        rollouts that an older policy sampled.
        """
        if self._rl.off_policy_steps or (step - 1) % self._rl.num_iterations:
            return
        for name, rounding in self._rounding.items():
            if name not in values:  # of an algorithm without a ratio
                continue
            mean = values[name]
            largest = values[f"{name}_max"]
            bound = self._rl.max_ratio_gap
            message = (
                f"rl: step {step}: sampling and scoring disagree by {name} {mean:.2g}, "
                f"at most {largest:.2g}"
            )
            if bound and largest > bound:
                raise UserError(
                    f"{message}, more than rl.max_ratio_gap={bound:g}: raise it above rounding "
                    "(docs/rl.md), or "
                    "compute in float32 (model.ar.dtype, model.dit.dtype)"
                )
            if mean > rounding and not self._warned:
                self._warned = True
                log_host0(f"{message}; rounding explains a mean of up to {rounding:g} (docs/rl.md)")
