"""Stands in for ``fi_cuda.launch.RepeatedLaunch`` beside kernels that stand in for others."""


class Repeated:
    """Launches of ``kernel`` with the values packed last; ``num_packed`` counts how often they were given."""

    num_packed = 0
    packed_for = None

    def __init__(self, kernel, device, grid_x):
        self.given = kernel, device, grid_x

    def pack(self, *values):
        self.values = values
        self.num_packed += 1

    def launch(self):
        kernel, device, grid_x = self.given
        kernel.launch(device, grid_x, 1, *self.values)
