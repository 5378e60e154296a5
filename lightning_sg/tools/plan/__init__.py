"""What a split would be, before it is trained: stages, their cost, and the speed-up to hope for."""

from lightning_sg.tools.plan.estimate import BoundaryPlan, Plan, StagePlan, plan

__all__ = ["BoundaryPlan", "Plan", "StagePlan", "plan"]
