"""What holds of the CUDA kernels beyond the tests of every op: resources, traffic, planted bugs."""
