"""Do drawing and scoring agree? Before the first update on a rollout the policy is the one that
drew it: all ratios should be 1.

They are two programs, which add up in another order; ROUNDING is what that explains of the mean of
|ratio - 1|. For tokens it grows with the logits: an error of theirs, an ulp or two, is the error of
a log-probability. Measured with the demo's model, of 2304 tokens at temperature 1 (token guidance
1.5): float32 9e-7 in the mean and 1.2e-5 at most, bfloat16 6e-3 and 0.12. Of a denoising step,
whose log-probability is a mean over the latents, little is left in float32; in bfloat16 the clip is
what an error must stay below, or the clip would be about rounding.
"""

from blip3o_jax.config import Config, UserError
from blip3o_jax.parallel.distributed import log_host0
from blip3o_jax.rl.rollout import trains_flow, trains_tokens

ROUNDING = {"float32": 1e-5, "bfloat16": 0.03}


class RatioMonitor:
    """Warns once where the mean is more than rounding explains; stops the run where the largest is
    above `rl.max_ratio_gap`.
    """

    def __init__(self, config: Config):
        self._rl, model = config.rl, config.model
        self._usual: dict[str, float] = {}  # by metric
        if trains_tokens(self._rl):
            self._usual["ratio_gap"] = _rounding(model.ar.dtype)
        if trains_flow(self._rl):
            self._usual["flow/ratio_gap"] = min(_rounding(model.dit.dtype), self._rl.flow.clip)
        self._warned = False

    def check(self, step: int, values: dict[str, float]) -> None:
        """Looks at the metrics of a step; of a later update on a rollout, and of stale rollouts,
        ratios tell nothing.
        """
        if self._rl.off_policy_steps or (step - 1) % self._rl.num_iterations:
            return
        for name, usual in self._usual.items():
            mean, largest, bound = values[name], values[f"{name}_max"], self._rl.max_ratio_gap
            told = f"rl: step {step}: drawing and scoring disagree by {name} {mean:.2g}, at most {largest:.2g}"
            if bound and largest > bound:
                raise UserError(
                    f"{told}, more than rl.max_ratio_gap={bound:g}: raise it to what rounding is worth (docs/rl.md), or "
                    "compute in float32 (model.ar.dtype, model.dit.dtype)"
                )
            if mean > usual and not self._warned:
                self._warned = True
                log_host0(f"{told}; of rounding {usual:g} in the mean would be much (docs/rl.md)")


def _rounding(dtype: str) -> float:
    return ROUNDING.get(dtype, ROUNDING["bfloat16"])
