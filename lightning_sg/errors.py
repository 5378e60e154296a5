"""Every error this package raises on purpose, so that users can catch one family."""


class SyntheticGradientsError(RuntimeError):
    """Base class of the errors that lightning_sg raises on purpose."""


class BoundaryError(SyntheticGradientsError):
    """A boundary is unknown, was not reached, was reached twice, or does not cut the network."""


class PartitionError(SyntheticGradientsError):
    """The stages between the boundaries cannot be placed on the processes."""


class BatchMismatchError(SyntheticGradientsError):
    """Two stages were given different batches."""


class NonFinitePredictionError(SyntheticGradientsError):
    """A gradient predictor returned NaN or infinity."""


class StageLostError(SyntheticGradientsError):
    """A neighbouring stage died, failed or stayed silent for longer than the timeout."""
