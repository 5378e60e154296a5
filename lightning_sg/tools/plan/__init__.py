"""Plans a split before anything is trained: its stages, what they cost, and the speed-up to expect at most."""

from lightning_sg.tools.plan.estimate import BoundaryPlan, Overhead, Plan, StagePlan, plan

__all__ = ["BoundaryPlan", "Overhead", "Plan", "StagePlan", "plan"]
