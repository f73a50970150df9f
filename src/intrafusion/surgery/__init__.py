"""Maps -> a smaller network, proved: maps on tensors, writing, permutation, running and tracing again."""
