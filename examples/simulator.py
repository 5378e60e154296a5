"""A network steers a pendulum that SciPy integrates: it learns from costs, as no gradient comes out of the simulator.

    python -m examples.simulator --plot simulator.png

The network sees where the pendulum is, how fast it swings and at which angle it is to come to rest, and answers with
the torques of the next two seconds. The plot shows the same pendulums before and after the training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import BlackBox, SyntheticGradients

#: Torques in a plan, and seconds that each is applied for.
TORQUES, PIECE = 8, 0.25
#: The largest torque; gravity pulls with at most 3.
STRONGEST = 6.0
GRAVITY, FRICTION = 3.0, 0.2
#: Angles that are recorded for each torque.
FRAMES = 5

Batch = tuple[Tensor, Tensor]


def simulate(start: np.ndarray, torques: np.ndarray) -> np.ndarray:
    """Swings pendulums, all at once.

    Args:
        start: Angle in radians and angular velocity, ``(N, 2)``; an angle of 0 hangs down.
        torques: As shares of the strongest, ``(N, 8)``; what is beyond -1 and 1 is cut off, as a motor would.

    Returns:
        Angle and velocity over time, ``(N, 1 + 8 · 5, 2)``.
    """
    from scipy.integrate import solve_ivp  # here: the rest of this module does without SciPy

    samples = len(start)
    state, frames = start.T.reshape(-1).astype(float), [start[:, None]]
    for torque in STRONGEST * np.clip(torques, -1, 1).T:

        def change(_time: float, now: np.ndarray, torque: np.ndarray = torque) -> np.ndarray:
            angle, velocity = now[:samples], now[samples:]
            return np.concatenate([velocity, torque - GRAVITY * np.sin(angle) - FRICTION * velocity])

        times = np.linspace(0, PIECE, FRAMES + 1)[1:]
        swing = solve_ivp(change, (0, PIECE), state, t_eval=times, rtol=1e-4, atol=1e-6).y  # (2 · N, 5)
        frames.append(swing.reshape(2, samples, FRAMES).transpose(1, 2, 0))
        state = swing[:, -1]
    return np.concatenate(frames, axis=1)


def cost_of(swing: np.ndarray, goal: np.ndarray, torques: np.ndarray) -> np.ndarray:
    """How far each pendulum is from rest at its goal, with a little for the torques: ``(N,)``."""
    angle, velocity = swing[:, -1, 0], swing[:, -1, 1]
    return (angle - goal) ** 2 + 0.1 * velocity**2 + 0.01 * (torques**2).mean(1)


class Steering(pl.LightningModule):
    """A small network before the simulator.

    Args:
        plant: The boundary with no way back.
        hidden: Width of the network.
        learning_rate: Adam's at the start; it falls to zero along a cosine.
    """

    def __init__(self, plant: BlackBox | None = None, hidden: int = 64, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.policy = nn.Sequential(
            nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, TORQUES), nn.Tanh()
        )
        self.plant = BlackBox(noise=0.1) if plant is None else plant
        self.learning_rate = learning_rate

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Torques ``(N, 8)`` for starts ``(N, 2)`` and goals ``(N,)``; explored in training, with what they are for."""
        start, goal = batch
        angle, velocity = start.unbind(1)
        seen = torch.stack([angle.sin(), angle.cos(), velocity, goal], dim=1)  # (N, 4)
        return self.plant(self.policy(seen), start, goal)

    def costs(self, batch: Batch) -> Tensor:
        """One for each row: NumPy and SciPy from here on."""
        torques, start, goal = (tensor.numpy(force=True) for tensor in self(batch))
        return torch.as_tensor(cost_of(simulate(start, torques), goal, torques), dtype=torch.float32)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean cost; its backward pass has the gradient that the critic supplies."""
        loss = self.plant.loss(self.costs(batch))
        self.log("train_cost", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The mean cost without exploration."""
        self.log("val_cost", self.plant.loss(self.costs(batch)), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Adam, its rate falling to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pendulums(samples: int, seed: int) -> TensorDataset:
    """Starts ``(N, 2)`` and goals ``(N,)``, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    start = 2 * torch.rand(samples, 2, generator=generator) - 1
    return TensorDataset(start, 3 * torch.rand(samples, generator=generator) - 1.5)


@torch.no_grad()
def swings(module: Steering, data: TensorDataset) -> np.ndarray:
    """Angle and velocity over time of pendulums that the network steers, ``(N, 41, 2)``."""
    training = module.training
    module.eval()
    torques, start, _goal = module((data.tensors[0], data.tensors[1]))
    module.train(training)
    return simulate(start.numpy(force=True), torques.numpy(force=True))


def draw(before: np.ndarray, after: np.ndarray, goals: np.ndarray, path: Path) -> None:
    """Draws the angles over time, before and after the training, with a mark at each goal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    times = np.linspace(0, TORQUES * PIECE, before.shape[1])
    colours = pyplot.get_cmap("viridis")((goals - goals.min()) / max(1e-9, float(np.ptp(goals))))
    for panel, title, swing in zip(panels, ("before the training", "after the training"), (before, after)):
        for angles, goal, colour in zip(swing[:, :, 0], goals, colours):
            panel.plot(times, angles, color=colour, linewidth=1)
            panel.plot(times[-1], goal, marker="o", color=colour, markersize=5)
        panel.set_title(title)
        panel.set_xlabel("seconds")
    panels[0].set_ylabel("angle in radians (dots: goals)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def train(steps: int = 600, batch_size: int = 64, seed: int = 0, plot: Path | None = None) -> dict[str, float]:
    """Trains the network and draws what it has learned.

    Args:
        steps: Training batches.
        batch_size: Pendulums in a batch.
        seed: Of weights and exploration.
        plot: Where to draw to; ``None`` draws nothing.

    Returns:
        The mean cost of held-out pendulums ``before`` and ``after``.
    """
    pl.seed_everything(seed, verbose=False)
    module, held_out, shown = Steering(), pendulums(256, seed=98), pendulums(12, seed=99)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[SyntheticGradients()],
    )
    start, goal = held_out.tensors
    before, first = float(module.eval().plant.loss(module.costs((start, goal)))), swings(module, shown)
    trainer.fit(module.train(), DataLoader(pendulums(64 * batch_size, seed=seed), batch_size, shuffle=True))
    after = float(module.eval().plant.loss(module.costs((start, goal))))
    if plot is not None:
        draw(first, swings(module, shown), shown.tensors[1].numpy(), plot)
    return {"before": before, "after": after}


def main() -> None:
    """Trains and prints the costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("outputs/simulator.png"))
    options = parser.parse_args()
    costs = train(options.steps, seed=options.seed, plot=options.plot)
    print(f"mean cost {costs['before']:.3f} before, {costs['after']:.3f} after {options.steps} steps: {options.plot}")


if __name__ == "__main__":
    main()
