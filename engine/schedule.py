"""Noise schedules as tables: every sampler is a row of coefficients per step (kernels/row.py).

Timesteps and noise levels are those of diffusers' scheduler of the same name, built from the prior's own scheduler
configuration; only the step itself is ours, written over (z, eps_hat, x0, previous x0, noise) so that guidance changes
x0 and holds eps_hat. Coefficients are computed in float64 and stored as float32.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior_files import PREDICTION_TYPES
from diffdfkd.kernels.row import COLUMNS

Array = np.ndarray

MOST_SIGNAL = 0.5
"""Of alpha at the first step; a schedule that begins with more of a picture is pointed out."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}

# Options of diffusers' schedulers that a table of linear rows cannot honour, or that belong to another method, with
# the values that we follow.
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddim": {"clip_sample": (False,), "thresholding": (False,)},
    "ddpm": {
        "clip_sample": (False,),
        "thresholding": (False,),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    },
    "euler": {},
    "dpmsolver++": {
        "thresholding": (False,),
        "solver_order": (1, 2),
        "solver_type": ("midpoint",),
        "algorithm_type": ("dpmsolver++",),
        "variance_type": (None,),
        "use_flow_sigmas": (False, None),
    },
    "lcm": {"clip_sample": (False,), "thresholding": (False,)},
}


@dataclass(frozen=True)
class Table:
    """A sampler over ``steps`` steps, on one device."""

    timesteps: Tensor
    """[S] float32, what the UNet is told."""
    rows: Tensor
    """[S, n_columns] float32, columns as in kernels/row.py."""
    initial_scale: float
    """The first z is this times unit noise."""
    sampler: str
    steps: int
    draws: tuple[bool, ...]
    """Per step, whether it adds noise. On the host, as the next field, so that the loop need not ask the device."""
    looks_back: tuple[bool, ...]
    """Per step, whether it uses the x0 of the step before."""


def make_table(
    sampler: str, scheduler_config: Mapping[str, Any], steps: int, device: torch.device | str = "cpu"
) -> Table:
    """Table of the sampler named as in a recipe, from a diffusers ``scheduler_config.json``.

    Raises UserError for a configuration that is not supported and for a number of steps that it does not allow.
    """
    scheduler = _scheduler(sampler, scheduler_config, steps)
    prediction_type = scheduler.config.prediction_type
    alpha, sigma, columns = _STEPS[sampler](scheduler)
    columns = {"input_scale": np.ones(steps), **_prediction(prediction_type, alpha, sigma), **columns}
    initial_scale = 1.0
    if sampler == "euler":
        # Euler's z is x0 + (sigma / alpha) eps: alpha * z is what the others call z.
        columns |= {"input_scale": alpha, "x0_z": columns["x0_z"] * alpha, "eps_z": columns["eps_z"] * alpha}
        initial_scale = float(scheduler.init_noise_sigma)
    columns |= {"alpha": alpha, "sigma": sigma}
    rows = np.stack([columns.get(name, np.zeros(steps)) for name in COLUMNS], axis=1)
    if not np.isfinite(rows).all():
        raise UserError(
            f"scheduler_config.json: prediction_type={prediction_type} divides by a signal or noise level of zero, "
            "which this schedule reaches (zero terminal SNR); it needs prediction_type=v_prediction"
        )
    return Table(
        timesteps=torch.tensor(np.asarray(scheduler.timesteps, dtype=np.float32), device=device),
        rows=torch.tensor(rows, dtype=torch.float32, device=device),
        initial_scale=initial_scale,
        sampler=sampler,
        steps=steps,
        draws=tuple((rows[:, COLUMNS.index("noise")] != 0).tolist()),
        looks_back=tuple((rows[:, COLUMNS.index("previous")] != 0).tolist()),
    )


def late_start(table: Table, scheduler_config: Mapping[str, Any]) -> str | None:
    """What is wrong where the schedule begins in the middle, so that the UNet takes pure noise for half a picture."""
    alpha = float(table.rows[0, COLUMNS.index("alpha")])
    if alpha <= MOST_SIGNAL:
        return None
    return (
        f"{table.steps} step(s) of {table.sampler} begin at timestep {int(table.timesteps[0])} of "
        f"{scheduler_config.get('num_train_timesteps', 1000)}, where the UNet expects {100 * alpha:.0f} % of a picture "
        f"in what is pure noise (timestep_spacing={scheduler_config.get('timestep_spacing', 'not given')} in "
        "scheduler_config.json): take more steps; a prior for so few has trailing there (SD-Turbo), or is sampled by "
        "lcm (LCM, LCM-LoRA)"
    )


def _scheduler(sampler: str, config: Mapping[str, Any], steps: int) -> Any:
    """Diffusers' scheduler with its timesteps set; refuses what the table could not follow."""
    import diffusers

    if sampler not in SCHEDULERS:
        raise UserError(f"synthesis.sampler: got {sampler}; allowed: {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, SCHEDULERS[sampler])
    known = set(inspect.signature(kind.__init__).parameters) | {"_use_default_values"}
    try:
        scheduler = kind.from_config({key: value for key, value in config.items() if key in known})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"prior.path: no {sampler} schedule from its scheduler_config.json ({error}); take another "
            "synthesis.sampler, or another prior"
        ) from None
    allowed = {"prediction_type": PREDICTION_TYPES, **SUPPORTED[sampler]}
    for key, values in allowed.items():
        given = scheduler.config.get(key)
        if given not in values:
            raise UserError(
                f"prior.path: {key}={given} in its scheduler_config.json is not supported by the {sampler} sampler; "
                f"allowed: {', '.join(str(value) for value in values)}"
            )
    total = scheduler.config.num_train_timesteps
    most = min(total, scheduler.config.get("original_inference_steps") or total) if sampler == "lcm" else total
    if not 1 <= steps <= most:
        raise UserError(f"synthesis.steps: got {steps}; the {sampler} schedule of this prior allows 1 to {most}")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UserError(f"synthesis.steps: {steps} steps of {sampler} are not possible: {error}") from None
    timesteps = scheduler.timesteps
    descending = bool((timesteps[1:] < timesteps[:-1]).all())
    if len(timesteps) != steps or not descending or timesteps[-1] < 0 or timesteps[0] >= total:
        raise UserError(
            f"synthesis.steps: {steps} steps of {sampler} give no descending timesteps in [0, {total}) with "
            f"timestep_spacing={scheduler.config.timestep_spacing} and "
            f"steps_offset={scheduler.config.get('steps_offset')}; take another number of steps"
        )
    return scheduler


def _prediction(prediction_type: str, alpha: Array, sigma: Array) -> dict[str, Array]:
    """Columns that read x0 and eps off z = alpha x0 + sigma eps and the output m; v = alpha eps - sigma x0."""
    zeros, ones = np.zeros_like(alpha), np.ones_like(alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {
            "epsilon": lambda: (1 / alpha, -sigma / alpha, zeros, ones),
            "v_prediction": lambda: (alpha, -sigma, sigma, alpha),
            "sample": lambda: (zeros, ones, 1 / sigma, -alpha / sigma),
        }[prediction_type]()
    return dict(zip(("x0_z", "x0_m", "eps_z", "eps_m"), values, strict=True))


def _levels(cumulative: Array) -> tuple[Array, Array]:
    return np.sqrt(cumulative), np.sqrt(1 - cumulative)


def _variance_preserving(scheduler: Any) -> tuple[Array, Array]:
    """Integer timesteps [S] and cumulative alphas [T]; diffusers' own float32 figures, so that 1 - alpha agrees."""
    return scheduler.timesteps.numpy(), scheduler.alphas_cumprod.double().numpy()


def _ddim(scheduler: Any) -> tuple[Array, Array, dict[str, Array]]:
    """Song et al., 2021 (arXiv 2010.02502), eq. 12 with eta 0."""
    timesteps, cumulative = _variance_preserving(scheduler)
    # Diffusers steps by a fixed stride, which rounding may set one off the next timestep.
    following = timesteps - scheduler.config.num_train_timesteps // len(timesteps)
    next_alpha, next_sigma = _levels(
        np.where(following >= 0, cumulative[following.clip(0)], float(scheduler.final_alpha_cumprod))
    )
    return *_levels(cumulative[timesteps]), {"x0": next_alpha, "eps": next_sigma}


def _ddpm(scheduler: Any) -> tuple[Array, Array, dict[str, Array]]:
    """Ho et al., 2020 (arXiv 2006.11239), eq. 7, with z replaced by alpha x0 + sigma eps_hat: x0 and eps_hat alone."""
    timesteps, cumulative = _variance_preserving(scheduler)
    now = cumulative[timesteps]
    following = np.append(cumulative[timesteps[1:]], 1.0)
    ratio = now / following
    alpha, sigma = _levels(now)
    held = np.sqrt(ratio) * (1 - following) / (1 - now)
    variance = 1 - ratio
    if scheduler.config.variance_type != "fixed_large":
        variance = variance * (1 - following) / (1 - now)
    columns = {
        "x0": np.sqrt(following) * (1 - ratio) / (1 - now) + held * alpha,
        "eps": held * sigma,
        "noise": np.where(timesteps > 0, np.sqrt(variance), 0.0),
    }
    return alpha, sigma, columns


def _ratio_levels(scheduler: Any) -> tuple[Array, Array]:
    """alpha and sigma [S + 1] from the ratio sigma / alpha, the last one being where the trajectory ends."""
    ratio = scheduler.sigmas.double().numpy()
    alpha = 1 / np.sqrt(ratio**2 + 1)
    return alpha, ratio * alpha


def _euler(scheduler: Any) -> tuple[Array, Array, dict[str, Array]]:
    """Karras et al., 2022 (arXiv 2206.00364), algorithm 1 with gamma 0: z' = x0 + sigma' eps in its own scale of z."""
    alpha, sigma = _ratio_levels(scheduler)
    following = scheduler.sigmas.double().numpy()[1:]
    return alpha[:-1], sigma[:-1], {"x0": np.ones_like(following), "eps": following}


def _dpmsolver(scheduler: Any) -> tuple[Array, Array, dict[str, Array]]:
    """DPM-Solver++ 2M, Lu et al., 2022 (arXiv 2211.01095), algorithm 2, with z replaced by alpha x0 + sigma eps_hat."""
    alpha, sigma = _ratio_levels(scheduler)
    steps = len(alpha) - 1
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha) - np.log(sigma)
    columns = {"x0": alpha[1:].copy(), "eps": sigma[1:].copy(), "previous": np.zeros(steps)}
    config = scheduler.config
    first_order_end = config.euler_at_final or config.final_sigmas_type == "zero"
    first_order_end = first_order_end or (config.lower_order_final and steps < 15)
    for step in range(1, steps - 1 if first_order_end else steps):
        if config.solver_order == 1:
            break
        h, h_before = log_snr[step + 1] - log_snr[step], log_snr[step] - log_snr[step - 1]
        extrapolation = 0.5 * alpha[step + 1] * -np.expm1(-h) * h / h_before
        columns["x0"][step] += extrapolation
        columns["previous"][step] = -extrapolation
    return alpha[:-1], sigma[:-1], columns


def _lcm(scheduler: Any) -> tuple[Array, Array, dict[str, Array]]:
    """Latent consistency models, Luo et al., 2023 (arXiv 2310.04378), algorithm 3; f = c_skip z + c_out x0."""
    timesteps, cumulative = _variance_preserving(scheduler)
    # The last step returns f itself.
    next_alpha, next_sigma = _levels(np.append(cumulative[timesteps[1:]], 1.0))
    scaled = timesteps * scheduler.config.timestep_scaling
    sigma_data = 0.5
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    columns = {"z": next_alpha * skip, "x0": next_alpha * out, "noise": next_sigma}
    return *_levels(cumulative[timesteps]), columns


_STEPS = {"ddim": _ddim, "ddpm": _ddpm, "euler": _euler, "dpmsolver++": _dpmsolver, "lcm": _lcm}
