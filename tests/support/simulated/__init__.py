"""A CUDA device that is not there: real numbers on the CPU, each storage tagged with the device that it would be on.

Mixing devices raises, and transfers and synchronisations are counted by the function of recon that causes them. It
cannot see the choice of kernels, CUDA's own list of autocast operations, races, the allocator, or NCCL; checkpoints
of torch that are not reentrant fail falsely in it.
"""
