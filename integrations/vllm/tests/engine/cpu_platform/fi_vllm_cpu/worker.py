"""vLLM's CPU worker with the one kernel that it launches itself written in torch."""

import torch
import vllm.utils.cpu_triton_utils as cpu_kernels
from vllm.v1.worker.cpu_worker import CPUWorker

PAD_SLOT = -1


class SlotMapping:
    """Stands for a launched kernel: page * block_size + offset of each new token."""

    def __getitem__(self, grid):
        return self.launch

    @staticmethod
    def launch(num_tokens, capacity, starts, positions, table, stride, block_size, slots, **constants):
        rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().long())
        places = positions[: len(rows)].long()
        pages = table[rows, places // block_size].long()
        slots[: len(rows)] = pages * block_size + places % block_size
        slots[num_tokens:capacity] = PAD_SLOT


cpu_kernels.compute_slot_mapping_kernel = SlotMapping()


class TestWorker(CPUWorker):
    __test__ = False
